"""What the model may see beside the question: the arms of the experiment.

Each arm is a pure function of (seed, question id) and the set of the question, so anybody gets the same contexts from
the same file. What an arm promises is asserted as it is built; a question for which it cannot be built is left out and
the reason is told.

Ref: Longpre et al. 2021 (counterfactual); Kaushik and Lipton 2018 (context-only).
"""

import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from babl.data.articles import articles
from babl.data.kinds import answer_kind
from babl.data.squad import Example
from babl.text.normalize import normalize_answer, same_form, spelled_words
from babl.text.segment import join, sentences, unspaced, words

TrainArm = Literal[
    "none", "blank", "random", "same-article", "answer-removed", "gold", "gold+distractors", "mixture", "context-only"
]
TestArm = Literal[
    "none",
    "blank",
    "random",
    "same-article",
    "answer-removed",
    "gold",
    "gold+distractors",
    "context-only",
    "counterfactual",
    "shuffled",
]
TRAIN_ARMS: tuple[TrainArm, ...] = get_args(TrainArm)
TEST_ARMS: tuple[TestArm, ...] = get_args(TestArm)
Arm = TrainArm | TestArm
OWN_CONTEXT = {"gold", "gold+distractors", "mixture", "context-only"}  # arms that show the question's whole paragraph
AROUND_ANSWER = {"answer-removed", "counterfactual", "shuffled"}  # arms that are made by where the answer stands

FILLER = "There is no text here. Nothing is said about the question. "
LENGTH_TOLERANCE = 0.1  # how far a random context may be from the gold one's number of words
DISTRACTORS = 2
SHOWN = 0.5  # share of the questions that the mixture shows with their context
NEIGHBOURS = 10  # most similar questions whose answers may stand in for a counterfactual one


@dataclass(frozen=True, slots=True)
class View:
    """What a model is shown of a question, and what it should answer.

    Attributes:
        id: Of the question.
        question: x; empty where it is withheld.
        context: c, or None where the question stands alone.
        golds: Every accepted answer; none where "unanswerable" is right.
        at: Code point of the context at which the target begins; None where the context does not hold it.
        words: The answer in the words of the question's own context; None where these are the first gold's.
    """

    id: str
    question: str
    context: str | None
    golds: tuple[str, ...] = ()
    at: int | None = None
    words: str | None = None

    @property
    def target(self) -> str | None:
        """What a model is trained to write; None where "unanswerable" is right."""
        return self.words or (self.golds[0] if self.golds else None)


def build_views(
    examples: Sequence[Example], arm: Arm, seed: int = 0, spans: bool = False
) -> tuple[list[View], dict[str, str]]:
    """Returns what each question looks like in this arm, and the reason by id where it cannot be built.

    * none: the question alone. blank: as many words of filler as the paragraph has.
    * random: a paragraph of another article, within 10 % of the words, longer ones cut.
    * same-article: another paragraph of the article, without any gold answer.
    * answer-removed: the paragraph without the sentences that hold a gold answer.
    * gold: the paragraph. gold+distractors: with the two likeliest others of its article around it in random order.
    * mixture: gold for half of the questions, none for the others. context-only: the paragraph without the question.
    * counterfactual: the answer replaced throughout by that of a similar question, which is right then.
    * shuffled: the paragraph's sentences in random order.

    Args:
        examples: The whole set; its paragraphs are what random, same-article and distracting ones are drawn from.
        arm: Which.
        seed: With the question's id, decides every draw.
        spans: Whether to leave out, where an arm shows the question's own context, an answer that it does not hold: a
            model would be trained to make it up. Without, such a question is asked all the same.
    """
    needs = AROUND_ANSWER | OWN_CONTEXT if spans else AROUND_ANSWER
    pool = _Pool(examples)
    build = _BUILDERS[arm]
    views, missing = [], {}
    for example in examples:
        if not example.context.strip() and arm != "none":
            missing[example.id] = "the question has no context"
            continue
        if arm in needs and example.answers and not example.span:
            missing[example.id] = "the context does not hold the answer"
            continue
        try:
            view = build(pool, pool.at[example.id], random.Random(f"{seed}/{arm}/{example.id}"))
        except _CannotBeBuilt as reason:
            missing[example.id] = str(reason)
            continue
        if view.at is not None:
            assert view.context and view.target and view.context.startswith(view.target, view.at), (arm, view)
        views.append(view)
    return views, missing


def holds(context: str, golds: Iterable[str]) -> bool:
    """Returns whether any gold stands in the context as the official scripts would find it, or as part of a word.

    Both texts are compared in the official normal form, which glues ("Gandhi's" is "gandhis"), and cut at all
    punctuation ("five-year" has "five", "24–10" has "24"), so that either form of a word gives the answer away.
    """
    return _holds(_readings(context), golds)


def _readings(text: str) -> tuple[str, str, str]:
    """Returns the text as a gold is looked for in it, words between spaces; the last is for golds without words."""
    return f" {normalize_answer(text)} ", f" {spelled_words(text)} ", same_form(text)


def _holds(readings: tuple[str, str, str], golds: Iterable[str]) -> bool:
    for gold in golds:
        official, spelled, same = (form.strip() for form in _readings(gold))
        if spelled and (f" {spelled} " in readings[1] or f" {official} " in readings[0]):
            return True
        if official and not spelled and same in readings[2]:  # "€", "→"
            return True
    return False


class _CannotBeBuilt(Exception):
    """The reason, in words."""


class _Pool:
    """The paragraphs and questions of a set, by length, by article and by likeness, in any order."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = sorted(examples, key=lambda e: e.id)
        self.at = {e.id: i for i, e in enumerate(self.examples)}
        names = articles(self.examples)
        self.article = {e.id: name for e, name in zip(self.examples, names, strict=True)}
        self.articles: dict[str, dict[str, tuple[str, str, str]]] = {}  # name -> context -> `_readings`
        for e, name in zip(self.examples, names, strict=True):
            article = self.articles.setdefault(name, {})
            if e.context.strip() and e.context not in article:
                article[e.context] = _readings(e.context)

    @cached_property
    def by_length(self) -> list[tuple[int, str, str]]:
        """(words, article, context), sorted."""
        return sorted((len(words(context)), name, context) for name, held in self.articles.items() for context in held)

    @cached_property
    def lengths(self) -> list[int]:
        return [length for length, _, _ in self.by_length]

    def others(self, example: Example) -> list[str]:
        """Returns the other paragraphs of the article that hold no gold answer."""
        golds = _forms(example)
        article = self.articles[self.article[example.id]]
        same = same_form(example.context)
        return [c for c, readings in article.items() if same_form(c) != same and not _holds(readings, golds)]

    @cached_property
    def rows(self) -> dict[str, int]:
        """The row of each paragraph in `paragraph_vectors`."""
        return {context: row for row, (_, _, context) in enumerate(self.by_length)}

    @cached_property
    def paragraph_vectors(self) -> tuple[Any, Any]:
        """(P, terms) TF-IDF of the paragraphs and (N, terms) of the questions; rows of unit length."""
        vectorizer = _vectorizer()
        paragraphs = vectorizer.fit_transform(self.rows)
        return paragraphs, vectorizer.transform(e.question for e in self.examples)

    @cached_property
    def question_vectors(self) -> Any:
        """(N, terms) TF-IDF of the questions, rows of unit length."""
        return _vectorizer().fit_transform(e.question for e in self.examples)


def _vectorizer() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import, and most arms need none

    return TfidfVectorizer(sublinear_tf=True, analyzer=lambda text: spelled_words(text).split())


def _golds(example: Example) -> tuple[str, ...]:
    return tuple(answer.text for answer in example.answers)


def _forms(example: Example) -> tuple[str, ...]:
    """Returns the golds, and the context's own words for them where these are others."""
    spans = (answer.span for answer in example.answers)
    return tuple(dict.fromkeys((*_golds(example), *(example.context[slice(*span)] for span in spans if span))))


def _none(pool: _Pool, i: int, rng: random.Random) -> View:
    example = pool.examples[i]
    golds = _golds(example)
    words = None if example.target in golds[:1] else example.target
    return View(example.id, example.question, None, golds, words=words)


def _gold(pool: _Pool, i: int, rng: random.Random) -> View:
    example = pool.examples[i]
    at = example.span[0] if example.span else None
    return replace(_none(pool, i, rng), context=example.context, at=at)


def _blank(pool: _Pool, i: int, rng: random.Random) -> View:
    filler = FILLER.split()
    context = " ".join(filler[k % len(filler)] for k in range(len(words(pool.examples[i].context))))
    return replace(_none(pool, i, rng), context=context)


def _random(pool: _Pool, i: int, rng: random.Random) -> View:
    example = pool.examples[i]
    length = len(words(example.context))
    low, high = length * (1 - LENGTH_TOLERANCE), length * (1 + LENGTH_TOLERANCE)
    first, last = bisect_left(pool.lengths, low), bisect_right(pool.lengths, high)
    alike, longer = pool.by_length[first:last], pool.by_length[last:]
    article = pool.article[example.id]
    context = _elsewhere(alike, article, rng)
    if context is None:
        chosen = _elsewhere(longer, article, rng)
        if chosen is None:
            raise _CannotBeBuilt("no paragraph of another article is long enough")
        context = chosen[: words(chosen)[length - 1][1]]
    return replace(_none(pool, i, rng), context=context)


def _elsewhere(rows: list[tuple[int, str, str]], article: str, rng: random.Random) -> str | None:
    """Returns a paragraph of another article, or None where the rows have none."""
    here = [k for k, (_, name, _) in enumerate(rows) if name == article]
    if len(rows) == len(here):
        return None
    at = rng.randrange(len(rows) - len(here))  # the at-th of those elsewhere
    for k in here:
        at += k <= at
    return rows[at][2]


def _same_article(pool: _Pool, i: int, rng: random.Random) -> View:
    others = pool.others(pool.examples[i])
    if not others:
        raise _CannotBeBuilt("no other paragraph of the article is without the answer")
    return replace(_none(pool, i, rng), context=rng.choice(others))


def _answer_removed(pool: _Pool, i: int, rng: random.Random) -> View:
    example = pool.examples[i]
    golds = _forms(example)
    if not any(map(normalize_answer, golds)):
        raise _CannotBeBuilt("there is no answer to remove")
    kept = []
    for start, end in sentences(example.context):
        overlaps = any(a.span and a.span[0] < end and start < a.span[1] for a in example.answers)
        if not overlaps and not holds(example.context[start:end], golds):
            kept.append(example.context[start:end])
    context = join(kept)
    if not kept:
        raise _CannotBeBuilt("every sentence holds the answer")
    if holds(context, golds):
        raise _CannotBeBuilt("the answer stands across sentences")
    return replace(_none(pool, i, rng), context=context)


def _gold_and_distractors(pool: _Pool, i: int, rng: random.Random) -> View:
    example = pool.examples[i]
    others = pool.others(example)
    if len(others) < DISTRACTORS:
        raise _CannotBeBuilt(f"the article has fewer than {DISTRACTORS} other paragraphs without the answer")
    paragraphs, questions = pool.paragraph_vectors
    likeness = (paragraphs[[pool.rows[context] for context in others]] @ questions[i].T).toarray().ravel()
    nearest = np.argsort(-likeness, kind="stable")[:DISTRACTORS]
    shown = [example.context, *(others[k] for k in nearest)]
    rng.shuffle(shown)
    view = _gold(pool, i, rng)
    before = len(join(shown[: shown.index(example.context) + 1])) - len(example.context)
    return replace(view, context=join(shown), at=None if view.at is None else before + view.at)


def _mixture(pool: _Pool, i: int, rng: random.Random) -> View:
    return (_gold if rng.random() < SHOWN else _none)(pool, i, rng)


def _context_only(pool: _Pool, i: int, rng: random.Random) -> View:
    return replace(_gold(pool, i, rng), question="")


def _counterfactual(pool: _Pool, i: int, rng: random.Random) -> View:
    example = pool.examples[i]
    golds = _forms(example)
    if not any(map(normalize_answer, golds)):
        raise _CannotBeBuilt("there is no answer to replace")
    substitutes = _similar_answers(pool, i)
    if not substitutes:
        raise _CannotBeBuilt("no similar question has another answer of the same kind")
    new = rng.choice(substitutes)
    context = example.context
    for old in sorted(golds, key=len, reverse=True):
        context = re.sub(_words(old), lambda _: new, context)
    if holds(context, golds):
        raise _CannotBeBuilt("the answer stands in the context in another form")
    found = re.search(_words(new), context)
    if found is None:
        raise _CannotBeBuilt("the answer is no whole word of the context")
    return View(example.id, example.question, context, (new,), found.start())


def _words(text: str) -> str:
    """Returns a pattern for the text where it begins and ends with words; anywhere, in a script without spaces."""
    before, after = ("" if unspaced(char) else r"\w" for char in (text[:1], text[-1:]))
    return rf"{before and f'(?<!{before})'}{re.escape(text)}{after and f'(?!{after})'}"


def _similar_answers(pool: _Pool, i: int) -> list[str]:
    """Returns answers of the same kind to the most similar questions elsewhere, each as often as found."""
    example = pool.examples[i]
    vectors = pool.question_vectors
    likeness = (vectors @ vectors[i].T).toarray().ravel()
    kind = answer_kind(example.answers[0].text)
    found: list[str] = []
    for j in np.argsort(-likeness, kind="stable"):
        other = pool.examples[j]
        if pool.article[other.id] == pool.article[example.id] or other.impossible:
            continue
        text = other.answers[0].text
        if answer_kind(text) != kind:
            continue
        if not holds(example.context, [text]) and normalize_answer(text):
            found.append(text)
            if len(found) == NEIGHBOURS:
                break
    return found


def _shuffled(pool: _Pool, i: int, rng: random.Random) -> View:
    view = _gold(pool, i, rng)
    context = pool.examples[i].context
    spans = sentences(context)
    if len(spans) < 2:
        raise _CannotBeBuilt("the context is a single sentence")
    order = spans
    while order == spans:
        order = rng.sample(spans, len(spans))
    pieces = [context[start:end] for start, end in order]
    if view.at is None:
        return replace(view, context=join(pieces))
    last = view.at + len(view.target or "")
    home = [k for k, (start, end) in enumerate(order) if start <= view.at and last <= end]
    if not home:
        raise _CannotBeBuilt("the answer stands across sentences")
    before = len(join(pieces[: home[0] + 1])) - len(pieces[home[0]])
    return replace(view, context=join(pieces), at=before + view.at - order[home[0]][0])


_BUILDERS: dict[str, Callable[[_Pool, int, random.Random], View]] = {
    "none": _none,
    "blank": _blank,
    "random": _random,
    "same-article": _same_article,
    "answer-removed": _answer_removed,
    "gold": _gold,
    "gold+distractors": _gold_and_distractors,
    "mixture": _mixture,
    "context-only": _context_only,
    "counterfactual": _counterfactual,
    "shuffled": _shuffled,
}
