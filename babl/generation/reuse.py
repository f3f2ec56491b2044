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


def shared_prefixes(prompts: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """Returns groups of prompts with a common beginning: its length, and the prompts' indices.

    Every prompt is in one group, and at least its last token is not part of the beginning. A prompt joins a group whose
    beginning it shares by half or more; questions about one paragraph do, questions that share an instruction alone
    do not.
    """
    groups: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(prompts)), key=lambda i: list(prompts[i])):
        prompt = prompts[index]
        if groups:
            length, members = groups[-1]
            common = _common(prompts[members[0]], prompt, min(length, len(prompt) - 1))
            if common >= max(WORTHWHILE, length / 2):
                groups[-1] = (common, [*members, index])
                continue
        groups.append((len(prompt) - 1, [index]))
    return groups


def _common(a: Sequence[int], b: Sequence[int], most: int) -> int:
    return next((i for i in range(most) if a[i] != b[i]), most)
