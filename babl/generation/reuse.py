"""What need not be computed token by token, or twice: copied drafts and shared beginnings."""

from collections.abc import Sequence

LONGEST_MATCH = 3  # tokens
WORTHWHILE = 16  # tokens: a shorter common beginning is not worth a pass of its own


def draft(source: Sequence[int], written: Sequence[int], number: int) -> list[int]:
    """Returns up to `number` tokens that may come next: what followed, in the source, the last tokens written.

    The longest match, of up to 3 tokens, decides, and of equal ones the last.

    Ref: Saxena 2023, "Prompt Lookup Decoding".
    """
    if number < 1:
        return []
    for size in range(min(LONGEST_MATCH, len(written)), 0, -1):
        tail = list(written[-size:])
        for at in range(len(source) - size - 1, -1, -1):
            if source[at + size - 1] == tail[-1] and list(source[at : at + size]) == tail:
                return list(source[at + size : at + size + number])
    return []


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Returns how many tokens all prompts begin with; at least the last token of each is its own."""
    if not prompts:
        return 0
    first, last = min(prompts, key=list), max(prompts, key=list)  # whatever these share, those between them do
    return _common(first, last, min(map(len, prompts)) - 1)


def shared_prefixes(prompts: Sequence[Sequence[int]], common: int = 0) -> list[tuple[int, list[int]]]:
    """Returns groups of prompts with a common beginning: its length, and the prompts' indices.

    Every prompt is in one group, and at least its last token is not part of the beginning. A prompt joins a group whose
    beginning it shares by half or more; questions about one paragraph do, questions that share an instruction alone
    do not.

    Args:
        prompts: In ids.
        common: Tokens that all begin with, which make no two of them alike.
    """
    groups: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(prompts)), key=lambda i: list(prompts[i])):
        prompt = prompts[index]
        if groups:
            length, members = groups[-1]
            shared = _common(prompts[members[0]], prompt, min(length, len(prompt) - 1))
            if shared - common >= max(WORTHWHILE, (length - common) / 2):
                groups[-1] = (shared, [*members, index])
                continue
        groups.append((len(prompt) - 1, [index]))
    return groups


def read_once(prompts: list[list[int]]) -> list[tuple[list[list[int]], list[int]]]:
    """Returns what to read one after the other, so that nothing is read twice: beginnings, and what each goes on from.

    First what all prompts begin with (worked examples), then what some do (a paragraph), last the prompts themselves;
    a step that would save nothing is left out. What each goes on from is an index into the step before.
    """
    everyone = common_prefix(prompts)
    groups = shared_prefixes(prompts, everyone)
    group_of = {i: g for g, (_, members) in enumerate(groups) for i in members}
    steps: list[tuple[list[list[int]], list[int]]] = []
    if everyone >= WORTHWHILE and len(groups) > 1:
        steps.append(([prompts[0][:everyone]], []))
    if len(groups) < len(prompts):
        steps.append(([prompts[members[0]][:length] for length, members in groups], [0] * len(groups)))
        return [*steps, (prompts, [group_of[i] for i in range(len(prompts))])]
    return [*steps, (prompts, [0] * len(prompts))]


def _common(a: Sequence[int], b: Sequence[int], most: int) -> int:
    return next((i for i in range(most) if a[i] != b[i]), most)
