"""Answers without a model, to be scored in the same table: what a trained one must beat to have learned anything."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np

from babl.data.kinds import AnswerKind, answer_kind, question_kind
from babl.data.squad import Example
from babl.errors import UserError

SPAN_WORDS = 5  # of the longest span that is guessed
BLOCK = 128  # questions compared at once with all of training

_WORD = re.compile(r"\S+")
_EDGE = ".,;:!?()[]{}\"'“”‘’"  # around a word, and no part of it
T = TypeVar("T", bound=str)


def baselines(train: Sequence[Example], test: Sequence[Example], seed: int) -> dict[str, dict[str, str]]:
    """Returns each baseline's answers by question id, the same for the same arguments.

    * empty: nothing
    * majority: the commonest answer to training questions of the same kind (who, when, ...), often nothing where many
      have none
    * nearest question: the answer to the training question that is nearest by TF-IDF
    * random span: drawn from the test context among the spans of up to five words of the kind of answer (a year, a
      person, ...) that is commonest for this kind of question in training; among all where there is none of the kind

    Args:
        train: Whose first answers are learned from; without one, nothing is the answer.
        test: Whose golds are not looked at.
        seed: Of the random spans.

    Raises:
        UserError: There is no training question.

    Ref: Lewis et al. 2021, nearest neighbours in closed-book question answering.
    """
    if not train:
        raise UserError("baselines learn from training questions, found none")
    answers = [example.answers[0].text if example.answers else "" for example in train]
    kinds = [question_kind(example.question) for example in train]
    majority = _commonest(zip(kinds, answers, strict=True))
    span_kind = _commonest((kind, answer_kind(answer)) for kind, answer in zip(kinds, answers, strict=True) if answer)
    nearest = _nearest([e.question for e in train], [e.question for e in test])
    guesses: dict[str, dict[str, str]] = {"empty": {}, "majority": {}, "nearest question": {}, "random span": {}}
    for example, neighbour in zip(test, nearest, strict=True):
        kind, spans = question_kind(example.question), _spans(example.context)
        wanted = span_kind.get(kind, span_kind.get(None))  # None where no training question has an answer
        choice = [span for k, span in spans if k == wanted] or [span for _, span in spans]
        guesses["empty"][example.id] = ""
        guesses["majority"][example.id] = majority.get(kind, majority[None])
        guesses["nearest question"][example.id] = answers[neighbour]
        guesses["random span"][example.id] = random.Random(f"{seed}/{example.id}").choice(choice) if choice else ""
    return guesses


def _commonest(pairs: Iterable[tuple[str, T]]) -> dict[str | None, T]:
    """Returns the commonest value of each key, and under None of all; of equally common ones the first by alphabet."""
    counts: defaultdict[str | None, Counter[T]] = defaultdict(Counter)
    for key, value in pairs:
        counts[key][value] += 1
        counts[None][value] += 1
    return {key: min(found, key=lambda value: (-found[value], value)) for key, found in counts.items()}


def _nearest(known: Sequence[str], asked: Sequence[str]) -> list[int]:
    """Returns the index of the known question nearest to each asked one by the cosine of TF-IDF, first of equals."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=r"\w+", dtype=np.float32)
    rows = vectorizer.fit_transform(known)  # (N, V), rows of length 1
    columns, queries = rows.T.tocsr(), vectorizer.transform(asked)
    nearest: list[int] = []
    for at in range(0, queries.shape[0], BLOCK):
        nearest += (queries[at : at + BLOCK] @ columns).toarray().argmax(1).tolist()
    return nearest


@lru_cache(maxsize=64)  # questions about one paragraph follow each other
def _spans(context: str) -> list[tuple[AnswerKind, str]]:
    """Returns the spans of up to `SPAN_WORDS` words with their kinds, in the order of the text."""
    words = [word.span() for word in _WORD.finditer(context)]
    ends = ((start, end) for at, (start, _) in enumerate(words) for _, end in words[at : at + SPAN_WORDS])
    spans = (context[start:end].strip(_EDGE) for start, end in ends)
    return [(answer_kind(span), span) for span in spans if span]
