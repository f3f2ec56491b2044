"""What a test set shares with a training set: whatever a model may know from there, it need not read.

Contexts. A test context is a near-duplicate where much of it stands in *one* training context: containment, the share
of its distinct n-grams found there. Containment is lopsided (a short context inside a long one is contained, though
their sets are far from alike), and MinHash, which estimates how alike two sets are, overlooks just that. The test
side's n-grams are few, so all of them are kept under exact names (`babl.data.corpus.NGrams`) and the training set
passes by: every pair is counted, nothing is estimated, and nothing is left to verify.

Questions. Two are paraphrases where their words (in normal form) have a Jaccard index of .8, or their TF-IDF vectors a
cosine of .9; the products of all pairs are sparse and made in blocks. Who asks the same with another name may pass for
a paraphrase and a free rewording may not: hence a strict and a loose threshold, and the pairs themselves, to be read.

Ref: Lewis et al. 2021, the classes of a test question: its question was in training, only its answer was, or neither.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from babl.data.articles import articles
from babl.data.corpus import NGrams, words
from babl.data.kinds import ANSWER_KINDS, answer_kind
from babl.data.squad import Example
from babl.text.normalize import normalize_answer, same_form

OverlapClass = Literal["question", "answer", "none"]
CLASSES: tuple[OverlapClass, ...] = get_args(OverlapClass)

GRAMS = (8, 13)  # words
CONTAINED = (0.5, 0.8)  # shares of a context's n-grams
STRICT = (0.8, 0.9)  # Jaccard index, TF-IDF cosine
LOOSE = (0.6, 0.7)
RARE_SHARE, RARE_LEAST = 0.01, 10  # a word is rare that stands in that share of the training contexts, or so many
CONTEXT_BLOCK, QUESTION_BLOCK = 512, 64  # training contexts, test questions


@dataclass(frozen=True, slots=True)
class Declared:
    """What the makers of checkpoints say these have seen, and which arm that helps."""

    checkpoints: str
    saw: str
    raises: str
    source: str


DECLARED = (
    Declared(
        "T5 v1.0 (t5-small ... t5-11b)",
        "SQuAD 1.1 train, supervised, in the prompt's own words, among other tasks; C4",
        "gold, none",
        "Raffel et al. 2020, on multi-task pre-training; the T5 repository's task mixtures",
    ),
    Declared(
        "FLAN-T5",
        "SQuAD 1.1 and 2.0 train, supervised, in several wordings; C4",
        "gold, none",
        "Chung et al. 2022; the task list of the Flan collection, Longpre et al. 2023",
    ),
    Declared(
        "T5 v1.1",
        "C4 alone: web text, Wikipedia's pages and their copies among it; no supervised task",
        "none",
        "the model cards of T5 v1.1",
    ),
    Declared(
        "LLaMA",
        "Wikipedia in 20 languages, C4, Common Crawl, books",
        "none",
        "Touvron et al. 2023, LLaMA, on pre-training data",
    ),
    Declared(
        "Llama 2, Llama 3",
        "public web text whose list is not published; take Wikipedia as seen",
        "none",
        "Touvron et al. 2023, Llama 2, on pre-training data; the model cards of Llama 3",
    ),
    Declared(
        "BLOOM",
        "ROOTS: Wikipedia in its languages, crawled and collected text",
        "none",
        "Laurençon et al. 2022, the ROOTS corpus",
    ),
    Declared(
        "BLOOMZ",
        "what BLOOM saw; xP3, supervised, with reading sets such as AdversarialQA, whose passages are SQuAD's",
        "gold, none",
        "Muennighoff et al. 2022; Bartolo et al. 2020 on AdversarialQA",
    ),
)

OVERLAP_BIASES = (
    "A test question or its answer in the training set raises the none arm: it can be remembered. "
    "The difference that the context makes shrinks.",
    "A test passage in the pre-training corpus raises the none arm, too: the fact can be remembered. "
    "The difference shrinks.",
    "SQuAD itself, supervised, in pre-training raises the gold arm: reading this kind of question was practised. "
    "The difference grows.",
)


@dataclass(frozen=True, slots=True)
class QuestionOverlap:
    """What of one test question is in the training set.

    Attributes:
        question: Its text.
        article: Whether its article is, by title or by any of its contexts.
        context_equal: Whether its context is, after normalisation.
        containment: n -> the largest share of its context's distinct n-grams in one training context.
        question_equal: Whether the question is, after normalisation.
        jaccard: The largest with a training question, of the two sets of words.
        cosine: The largest with a training question, of the two TF-IDF vectors.
        nearest: Id of the training question that comes nearest to being a paraphrase; None where none shares a word.
        nearest_question: Its text.
        same_answer: Whether a gold of the one is a gold of the other.
        answer: Whether a gold is a gold of any training question.
        told: Whether a training context has a gold and a rare capitalised word of the question.
        strict: Lewis' class at the strict threshold.
        loose: The same at the loose one.
    """

    question: str
    article: bool
    context_equal: bool
    containment: dict[int, float]
    question_equal: bool
    jaccard: float
    cosine: float
    nearest: str | None
    nearest_question: str
    same_answer: bool
    answer: bool
    told: bool
    strict: OverlapClass
    loose: OverlapClass


@dataclass(frozen=True)
class Overlap:
    """What a test set shares with a training set.

    Attributes:
        questions: Test question id -> what of it is in the training set, in the order of the test set.
        summary: All counts, as JSON takes them.
    """

    questions: dict[str, QuestionOverlap]
    summary: dict[str, Any]

    @property
    def classes(self) -> dict[str, OverlapClass]:
        """Question id -> Lewis' class at the strict threshold, which finds the least overlap."""
        return {qid: found.strict for qid, found in self.questions.items()}

    @property
    def loose_classes(self) -> dict[str, OverlapClass]:
        """Question id -> Lewis' class at the loose threshold, which finds the most."""
        return {qid: found.loose for qid, found in self.questions.items()}


def find_overlap(train: Sequence[Example], test: Sequence[Example]) -> Overlap:
    """Returns what the test set shares with the training set: articles, contexts, questions, answers.

    Args:
        train: Many questions.
        test: Fewer.
    """
    names = articles([*train, *test])
    theirs, ours = names[: len(train)], names[len(train) :]
    both = set(theirs).intersection(ours)
    train_contexts, test_contexts = (list(dict.fromkeys(e.context for e in part)) for part in (train, test))
    contexts = _contexts(train_contexts, test_contexts)
    nearest = _nearest_questions(train, test)
    answers = {gold for e in train for gold in _golds(e)}
    told = _told(train_contexts, test)
    questions = {}
    for example, article in zip(test, ours, strict=True):
        equal, containment = contexts[example.context]
        near = nearest[_form(example.question)]
        golds = _golds(example)
        known = not golds.isdisjoint(answers)
        otherwise: OverlapClass = "answer" if known else "none"
        questions[example.id] = QuestionOverlap(
            question=example.question,
            article=article in both,
            context_equal=equal,
            containment=containment,
            question_equal=near.equal,
            jaccard=near.jaccard,
            cosine=near.cosine,
            nearest=near.examples[0].id if near.examples else None,
            nearest_question=near.examples[0].question if near.examples else "",
            same_answer=any(not golds.isdisjoint(_golds(e)) for e in near.examples),
            answer=known,
            told=example.id in told,
            strict="question" if near.passes(STRICT) else otherwise,
            loose="question" if near.passes(LOOSE) else otherwise,
        )
    sizes = {"train": _sizes(train, theirs), "test": _sizes(test, ours), "titles": sorted(both)}
    return Overlap(questions, sizes | _summary(test, questions))


def _form(question: str) -> str:
    """Returns the normal form of a question: equal for what is the same text, and beside it without punctuation."""
    return normalize_answer(same_form(question))


def _golds(example: Example) -> set[str]:
    return {normalize_answer(answer.text) for answer in example.answers} - {""}


def _contexts(train: list[str], test: list[str]) -> dict[str, tuple[bool, dict[int, float]]]:
    """Returns of each test context whether it equals a training context, and n -> its containment in one."""
    texts = [words(same_form(context)) for context in test]
    keys = [" ".join(text) for text in texts]
    grams = NGrams(texts, max(GRAMS))
    sizes = [n for n in GRAMS if n <= len(grams.tables)]  # a context of fewer words has no n-gram, and contains none
    ours = {n: _incidence(grams.owner[grams.places[n - 1]], grams.names[n - 1], len(test)) for n in sizes}
    most = {n: np.zeros(len(test)) for n in GRAMS}
    equal: set[str] = set()
    for start in range(0, len(train), CONTEXT_BLOCK):
        block = [words(same_form(context)) for context in train[start : start + CONTEXT_BLOCK]]
        equal |= {" ".join(text) for text in block}.intersection(keys)
        ids, owner = grams.encode(block)
        for n, at, names in grams.find(ids):
            if n in GRAMS:
                theirs = _incidence(owner[at], names, len(block), ours[n].shape[1])
                shared = (ours[n] @ theirs.T).max(axis=1).toarray()  # (test contexts,) with the best of the block
                most[n] = np.maximum(most[n], shared)
    for n in sizes:
        most[n] /= np.maximum(np.diff(ours[n].indptr), 1)
    return {c: (keys[i] in equal, {n: float(most[n][i]) for n in GRAMS}) for i, c in enumerate(test)}


def _incidence(texts: np.ndarray, names: np.ndarray, rows: int, columns: int | None = None) -> sparse.csr_array:
    """Returns (texts, n-grams), 1 where a text has an n-gram, however often."""
    shape = (rows, names.max() + 1 if columns is None else columns)
    matrix = sparse.coo_array((np.ones(len(names), np.int32), (texts, names)), shape=shape).tocsr()  # sums
    matrix.data[:] = 1
    return matrix


@dataclass(frozen=True, slots=True)
class _Nearest:
    """The training questions, of one normal form, that come nearest to a test question; see `QuestionOverlap`."""

    equal: bool
    jaccard: float
    cosine: float
    examples: list[Example]

    def passes(self, thresholds: tuple[float, float]) -> bool:
        return self.equal or self.jaccard >= thresholds[0] or self.cosine >= thresholds[1]


def _nearest_questions(train: Sequence[Example], test: Sequence[Example]) -> dict[str, _Nearest]:
    """Returns what is nearest to each test question, by its normal form."""
    groups: dict[str, list[Example]] = {}
    for example in train:
        groups.setdefault(_form(example.question), []).append(example)
    texts = list(dict.fromkeys(_form(e.question) for e in test))
    if not any(texts):
        return {text: _Nearest(text in groups, 0.0, 0.0, groups.get(text, [])) for text in texts}
    # Fitted on both sides: a name that only one of them has is a rare word, not one to leave out.
    vectors = TfidfVectorizer(analyzer=str.split).fit(dict.fromkeys([*groups, *texts]))
    ours, theirs = (sparse.csr_array(vectors.transform(part)) for part in (texts, groups))
    our_sizes, their_sizes = np.diff(ours.indptr), np.diff(theirs.indptr)  # distinct words

    def jaccard(row: int, columns: np.ndarray, shared: np.ndarray) -> np.ndarray:
        return shared / (our_sizes[row] + their_sizes[columns] - shared)

    by_words = _best(_ones(ours), _ones(theirs), jaccard)
    by_weight = _best(ours, theirs, lambda row, columns, cosine: np.minimum(cosine, 1.0))
    forms = list(groups)
    nearest = {}
    for text, (a, most_jaccard), (b, most_cosine) in zip(texts, by_words, by_weight, strict=True):
        better = a if most_jaccard / STRICT[0] >= most_cosine / STRICT[1] else b
        form = text if text in groups else forms[better] if most_cosine > 0 else None
        nearest[text] = _Nearest(text in groups, most_jaccard, most_cosine, groups[form] if form is not None else [])
    return nearest


def _ones(vectors: sparse.csr_array) -> sparse.csr_array:
    return sparse.csr_array((np.ones_like(vectors.data, np.int32), vectors.indices, vectors.indptr), vectors.shape)


def _best(
    ours: sparse.csr_array, theirs: sparse.csr_array, score: Callable[[int, np.ndarray, np.ndarray], np.ndarray]
) -> list[tuple[int, float]]:
    """Returns for each of our rows which of theirs scores best, the first of equals, and its score; else 0 and 0.

    A score is of the row, the columns that share a word with it, and the products with these.
    """
    best = [(0, 0.0)] * ours.shape[0]
    columns_first = theirs.T.tocsr()
    for start in range(0, ours.shape[0], QUESTION_BLOCK):
        product = ours[start : start + QUESTION_BLOCK] @ columns_first
        for row, (low, high) in enumerate(itertools.pairwise(product.indptr), start=start):
            if low < high:
                columns = product.indices[low:high]
                scores = score(row, columns, product.data[low:high])
                best[row] = int(columns[scores == scores.max()].min()), float(scores.max())
    return best


def _told(train_contexts: Iterable[str], test: Sequence[Example]) -> set[str]:
    """Returns the ids of questions for which one training context has a gold and a rare capitalised word."""
    marks = {e.id: _capitalised(e.question) for e in test}
    wanted = set().union(*marks.values())
    texts: list[str] = []
    holders: dict[str, list[int]] = {word: [] for word in wanted}  # -> contexts
    for i, context in enumerate(train_contexts):
        text = words(context)
        texts.append(f" {' '.join(text)} ")
        for word in wanted.intersection(text):
            holders[word].append(i)
    most = max(RARE_LEAST, RARE_SHARE * len(texts))
    told = set()
    for example in test:
        near = {i for word in marks[example.id] if len(holders[word]) <= most for i in holders[word]}
        if any(f" {gold} " in texts[i] for gold in _golds(example) for i in near):
            told.add(example.id)
    return told


def _capitalised(question: str) -> set[str]:
    """Returns the normal forms of its words with a capital, but for the first, which always has one."""
    return {form for word in question.split()[1:] if word[0].isupper() for form in words(word)}


def _summary(test: Sequence[Example], found: dict[str, QuestionOverlap]) -> dict[str, Any]:
    of_context = {e.context: found[e.id] for e in test}
    kinds = {e.id: answer_kind(e.answers[0].text) for e in test if e.answers}
    asked, known = Counter(kinds.values()), Counter(kind for qid, kind in kinds.items() if found[qid].answer)
    paraphrased = [q for q in found.values() if q.strict == "question" and not q.question_equal]
    return {
        "contexts": {
            "equal": sum(q.context_equal for q in of_context.values()),
            "near": {
                str(n): {str(share): sum(q.containment[n] >= share for q in of_context.values()) for share in CONTAINED}
                for n in GRAMS
            },
        },
        "questions": {
            "equal": sum(q.question_equal for q in found.values()),
            "equal_same_answer": sum(q.question_equal and q.same_answer for q in found.values()),
            "paraphrased": len(paraphrased),
            "paraphrased_same_answer": sum(q.same_answer for q in paraphrased),
        },
        "classes": {
            "strict": _counts(q.strict for q in found.values()),
            "loose": _counts(q.loose for q in found.values()),
        },
        "answers": {kind: {"questions": asked[kind], "known": known[kind]} for kind in ANSWER_KINDS if asked[kind]},
        "told": sum(q.told for q in found.values()),
    }


def _sizes(examples: Sequence[Example], articles: Sequence[str]) -> dict[str, int]:
    contexts = {e.context for e in examples}
    return {"questions": len(examples), "contexts": len(contexts), "articles": len(set(articles))}


def _counts(classes: Iterable[OverlapClass]) -> dict[str, int]:
    counts = Counter(classes)
    return {name: counts[name] for name in CLASSES}
