"""Which questions belong to one article, and what two sets share.

Two questions are of one article where their titles are the same, or their contexts are; where a question has no
context, its own text stands for it. What "the same" means is `babl.text.normalize.same_form` alone, in training, in the
experiment and in the overlap report.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from babl.data.squad import Example
from babl.errors import UserError
from babl.text.normalize import same_form, spelled_words

GRAM = 8  # words
NEAR = 0.5  # share of a context's n-grams


def articles(examples: Sequence[Example]) -> list[str]:
    """Returns the name of each question's article: the first, in order, of the titles that are one article."""
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    nodes = {(e.title, _passage(e)): list(_nodes(e)) for e in examples}
    for first, *others in nodes.values():
        for other in others:
            parent[root(other)] = root(first)
    name: dict[str, str] = {}
    for title, passage in sorted(nodes):
        name.setdefault(root(nodes[title, passage][0]), title or passage)
    return [name[root(nodes[e.title, _passage(e)][0])] for e in examples]


def _passage(example: Example) -> str:
    return example.context if example.context.strip() else example.question


def _nodes(example: Example) -> Iterator[str]:
    """Yields what joins the question to others: its passage, and its title where it has one."""
    yield f"passage {same_form(_passage(example))}"
    if title := same_form(example.title):
        yield f"title {title}"


def split_by_article(
    examples: Sequence[Example], fraction: float, seed: int, at_least: int = 1
) -> tuple[list[Example], list[Example]]:
    """Returns a training and a validation part that share no article.

    Articles enter the validation part in the order of a hash of their name, until it has its share of the questions.

    Args:
        examples: Of at least twice as many articles as each side must have.
        fraction: Share of the questions, in (0, 1).
        seed: Of the hash.
        at_least: Articles on each side.

    Raises:
        UserError: There are fewer articles.
    """
    names = articles(examples)
    sizes = Counter(names)
    order = sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    if len(order) < 2 * at_least:
        raise UserError(
            f"a validation slice needs at least {2 * at_least} articles, the data has {len(order)}; where titles tell "
            "nothing, data.articles=context takes each context for an article"
        )
    held: set[str] = set()
    questions = 0
    for name in order[:-at_least]:
        if len(held) >= at_least and questions >= fraction * len(examples):
            break
        held.add(name)
        questions += sizes[name]
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example, name in zip(examples, names, strict=True):
        parts[name in held].append(example)
    return parts


@dataclass(frozen=True, slots=True)
class Shared:
    """What a test set has in common with a training set, by `same_form`.

    Attributes:
        articles: Names of the articles in both.
        contexts: Different contexts of the test set that are in the training set too.
        questions: Questions of the test set that are asked, word for word, in the training set too.
        of: The test set's numbers of contexts and questions.
        near: Different contexts of the test set, not equal to any, that nearly stand in one training context.
    """

    articles: list[str]
    contexts: int
    questions: int
    of: tuple[int, int]
    near: int

    def __str__(self) -> str:
        return (
            f"{self.contexts:,} of {self.of[0]:,} contexts and {self.questions:,} of {self.of[1]:,} questions are "
            f"equal, {self.near:,} more contexts nearly"
        )


def shared(train: Sequence[Example], test: Sequence[Example]) -> Shared:
    """Returns what the test set has in common with the training set, whatever titles, case or Unicode form it has."""
    names = articles([*train, *test])
    both = set(names[: len(train)]).intersection(names[len(train) :])
    theirs, ours = ({same_form(e.context): e.context for e in part if e.context.strip()} for part in (train, test))
    others = [context for form, context in ours.items() if form not in theirs]
    asked = {same_form(e.question) for e in train}
    questions = sum(same_form(e.question) in asked for e in test)
    equal = len(ours) - len(others)
    return Shared(sorted(both), equal, questions, (len(ours), len(test)), _near(theirs.values(), others))


def _near(train: Iterable[str], test: Sequence[str]) -> int:
    """Returns how many test contexts have at least `NEAR` of their different n-grams in one training context."""
    owners: dict[tuple[str, ...], list[int]] = {}
    sizes = []
    for i, context in enumerate(test):
        grams = _grams(context)
        sizes.append(len(grams))
        for gram in grams:
            owners.setdefault(gram, []).append(i)
    found: set[int] = set()
    for context in train:
        hits = Counter(i for gram in _grams(context) & owners.keys() for i in owners[gram])
        found |= {i for i, number in hits.items() if number >= NEAR * sizes[i]}
    return len(found)


def _grams(text: str) -> set[tuple[str, ...]]:
    words = spelled_words(text).split()
    return set(zip(*(words[i:] for i in range(GRAM)), strict=False))


def disjoint(train: Sequence[Example], test: Sequence[Example], key: str, files: tuple[str, str]) -> str:
    """Returns a line to show on what is nearly the same in both sets, or asked in both; empty where nothing is.

    Args:
        train: Questions.
        test: Others.
        key: Of the configuration, that names the test set.
        files: Names of the two, training first.

    Raises:
        UserError: They share an article.
    """
    found = shared(train, test)
    if number := len(found.articles):
        hint = "" if found.contexts else "; where titles tell nothing, data.articles=context takes each context for one"
        raise UserError(
            f"{key}: {files[1]} shares {number:,} article{'s' if number > 1 else ''} with {files[0]}, "
            f"first {found.articles[0]!r} "
            f"({found}); give a file of other articles{hint}"
        )
    if not found.questions and not found.near:
        return ""
    return f"{key}: beside {files[0]}, {found}; babl overlap shows which"
