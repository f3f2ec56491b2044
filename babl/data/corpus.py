"""How much of a data set stands in a pre-training corpus, which is read once, line by line.

All that is kept is the data set's own n-grams; a corpus of any size flows past them. Texts are compared as words, in
the normal form of `babl.text.normalize`. Four scores, since those in use disagree:

* GPT-3's: any n-gram of the text stands in the corpus, n being the 5th percentile of the field's lengths, within 8 to
  13 words (Brown et al. 2020, appendix C; its list of n-grams too common to tell is not kept).
* PaLM's: of the text's 8-grams, the share that stands in the corpus; dirty from .7 on (Chowdhery et al. 2022, 8).
* Llama 2's: the share of words inside a match of more than 10 words, of which the first 10 and the last are equal and
  at most 4 between differ; clean below .2, dirty from .8 on (Touvron et al. 2023, appendix A.6).
* The longest run of words that stands in one document.
"""

import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from babl.data.squad import Example
from babl.errors import UserError
from babl.text.normalize import normalize_answer

FIELDS = ("question", "context", "answer", "question+answer")  # the answer is the first gold, as in training
SHORTEST, LONGEST = 8, 13  # words of GPT-3's n-grams
PALM_WORDS, PALM_DIRTY = 8, 0.7
LLAMA_EXACT, LLAMA_SKIPS = 10, 4  # words a match must begin with; words that may differ after them
LLAMA_CLEAN, LLAMA_DIRTY = 0.2, 0.8
BATCH_WORDS = 1 << 16  # of the corpus looked up at once
HITS = 1024  # places of a batch that are aligned at once

UNKNOWN, END = -1, -2  # ids of a word that no text has, and of the place after a text


def words(text: str) -> list[str]:
    """Returns the words of the text's normal form; nothing of it is cached."""
    return normalize_answer.__wrapped__(text).split()


class NGrams:
    """Every n-gram of a list of texts, up to a length, each under an integer name of its own.

    An n-gram's name comes from a table of (name of its first n-1 words, last word): nothing is hashed, so a match is
    exact as it is found. An n-gram can be known only where its beginning is; a search thus has less to do at each
    length, and little at all in a text that has nothing to do with these.

    Attributes:
        ids: (P,) all texts one after the other as word ids, each followed by END.
        owner: (P,) which text a place belongs to.
        places: Of n = 1, 2, ...: where in `ids` an n-gram begins.
        names: Of n = 1, 2, ...: its name there.
        tables: Of n = 1, 2, ...: sorted keys; an n-gram's name is its key's place.

    Ref: Karp, Miller, Rosenberg 1972, naming of substrings.
    """

    def __init__(self, texts: Sequence[Sequence[str]], longest: int = LONGEST):
        vocabulary = dict.fromkeys(word for text in texts for word in text)
        self._vocabulary = {word: i for i, word in enumerate(vocabulary)}
        self.ids, self.owner = self.encode(texts)
        self.places: list[np.ndarray] = []
        self.names: list[np.ndarray] = []
        self.tables: list[np.ndarray] = []
        at, names = np.arange(len(self.ids)), np.zeros(len(self.ids), np.int64)
        for n in range(1, longest + 1):
            at, keys = self._keys(self.ids, at, names, n)
            if not len(at):
                break
            table, names = np.unique(keys, return_inverse=True)
            self.tables.append(table)
            self.places.append(at.astype(np.int32))
            self.names.append(names.astype(np.int32))

    def encode(self, texts: Iterable[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the texts as ids, each followed by END, and which text each place belongs to."""
        get = self._vocabulary.get
        rows = [[*(get(word, UNKNOWN) for word in text), END] for text in texts]
        ids = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
        return ids, np.repeat(np.arange(len(rows)), [len(row) for row in rows])

    def find(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields n, where in the ids a known n-gram begins, and its name, for n = 1, 2, ... until none is found."""
        at, names = np.arange(len(ids)), np.zeros(len(ids), np.int64)
        for n, table in enumerate(self.tables, start=1):
            at, keys = self._keys(ids, at, names, n)
            names = np.searchsorted(table, keys)
            known = table[np.minimum(names, len(table) - 1)] == keys
            at, names = at[known], names[known]
            if not len(at):
                return
            yield n, at, names

    def _keys(self, ids: np.ndarray, at: np.ndarray, names: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns where the n-th word is known, and the keys there; a known word is never the last id, which is END."""
        last = ids[at + n - 1]
        known = last >= 0
        return at[known], names[known] * len(self._vocabulary) + last[known]


@dataclass(frozen=True, slots=True)
class Exposure:
    """How much of one text stands in the corpus; None where it is too short for the score.

    Attributes:
        words: Its length.
        ngram: Whether one of its n-grams does (GPT-3).
        eightgrams: Share of its 8-grams that do (PaLM).
        matched: Share of its words inside long matches (Llama 2).
        longest: Words of the longest run that does.
    """

    words: int
    ngram: bool | None
    eightgrams: float | None
    matched: float | None
    longest: int


@dataclass(frozen=True)
class CorpusOverlap:
    """What a corpus holds of a data set.

    Attributes:
        exposures: Field -> question id -> scores; a question without an answer has none in the fields with one.
        ngram_words: Field -> n of GPT-3's score.
        documents: How many were read.
    """

    exposures: dict[str, dict[str, Exposure]]
    ngram_words: dict[str, int]
    documents: int

    @property
    def summary(self) -> dict[str, Any]:
        """Returns counts of questions for each field, as JSON takes them."""
        fields = {field: _summary(list(found.values())) for field, found in self.exposures.items() if found}
        for field, counts in fields.items():
            counts["gpt3"] = {"n": self.ngram_words[field]} | counts["gpt3"]
        return {"documents": self.documents, "fields": fields}


def _summary(found: list[Exposure]) -> dict[str, Any]:
    any_ngram = [e.ngram for e in found if e.ngram is not None]
    eightgrams = [e.eightgrams for e in found if e.eightgrams is not None]
    matched = [e.matched for e in found if e.matched is not None]
    return {
        "questions": len(found),
        "gpt3": {"measured": len(any_ngram), "dirty": sum(any_ngram)},
        "palm": {"measured": len(eightgrams), "dirty": sum(share >= PALM_DIRTY for share in eightgrams)},
        "llama2": {
            "measured": len(matched),
            "clean": sum(share < LLAMA_CLEAN for share in matched),
            "dirty": sum(share >= LLAMA_DIRTY for share in matched),
        },
        "longest": {
            "median": float(np.median([e.longest for e in found])),
            "max": max(e.longest for e in found),
            "whole": sum(e.longest == e.words > 0 for e in found),
        },
    }


def corpus_overlap(examples: Sequence[Example], documents: Iterable[str]) -> CorpusOverlap:
    """Returns how much of each question's fields stands in the documents, which are read once, one by one.

    Args:
        examples: The data set; its n-grams are what is held in memory.
        documents: Texts of any number.
    """
    fields: dict[str, dict[str, tuple[str, ...]]] = {field: {} for field in FIELDS}
    for example in examples:
        question = fields["question"][example.id] = tuple(words(example.question))
        fields["context"][example.id] = tuple(words(example.context))
        if not example.impossible:
            answer = fields["answer"][example.id] = tuple(words(example.answers[0].text))
            fields["question+answer"][example.id] = question + answer
    index: dict[tuple[str, ...], int] = {}
    for texts in fields.values():
        for text in texts.values():
            index.setdefault(text, len(index))
    corpus = _Corpus(list(index))
    count = 0
    for batch in _batches(documents):
        count += len(batch)
        corpus.read(batch)
    lengths = {field: [len(text) for text in texts.values()] or [0] for field, texts in fields.items()}
    ngram_words = {field: int(np.clip(np.percentile(lengths[field], 5), SHORTEST, LONGEST)) for field in FIELDS}
    exposures = {}
    for field, texts in fields.items():
        scores = corpus.exposures(ngram_words[field])
        exposures[field] = {qid: scores[index[text]] for qid, text in texts.items()}
    return CorpusOverlap(exposures, ngram_words, count)


def _batches(documents: Iterable[str]) -> Iterator[list[list[str]]]:
    """Yields the words of documents that together have about BATCH_WORDS."""
    batch: list[list[str]] = []
    size = 0
    for document in documents:
        batch.append(words(document))
        size += len(batch[-1])
        if size >= BATCH_WORDS or len(batch) >= BATCH_WORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Corpus:
    """What of the texts has stood in the documents read so far."""

    def __init__(self, texts: Sequence[Sequence[str]]):
        self.grams = NGrams(texts)
        self.lengths = np.array([len(text) for text in texts])
        self.ends = np.cumsum(self.lengths + 1) - 1  # (texts,) where END stands
        self.seen = [np.zeros(len(table), bool) for table in self.grams.tables]  # by name
        self.inside = np.zeros(len(self.grams.ids), bool)  # a match, as Llama 2 has it
        self.longest = np.zeros(len(texts), np.int64)
        if len(self.seen) >= LLAMA_EXACT:  # where each beginning of a match stands, in the order of names
            names = self.grams.names[LLAMA_EXACT - 1]
            self.starts = self.grams.places[LLAMA_EXACT - 1][np.argsort(names, kind="stable")]
            self.bounds = np.concatenate([[0], np.cumsum(np.bincount(names))])

    def read(self, documents: Sequence[Sequence[str]]) -> None:
        """These documents count, too."""
        ids, _ = self.grams.encode(documents)
        ends = np.flatnonzero(ids == END)
        for n, at, names in self.grams.find(ids):
            self.seen[n - 1][names] = True
            if n == LLAMA_EXACT:
                for i in range(0, len(at), HITS):
                    self._align(ids, ends, at[i : i + HITS], names[i : i + HITS])

    def _align(self, ids: np.ndarray, ends: np.ndarray, at: np.ndarray, names: np.ndarray) -> None:
        """Follows each pair of equal beginnings, one in a text and one in a document, to the right."""
        counts = self.bounds[names + 1] - self.bounds[names]
        there = np.repeat(at, counts)  # in the documents
        offsets = np.arange(len(there)) - np.repeat(np.cumsum(counts) - counts, counts)
        here = self.starts[np.repeat(self.bounds[names], counts) + offsets]  # in the texts
        # What begins one word later in the same run ends where this one ends. A text found whole has nothing to add.
        texts = self.grams.owner[here]
        first = (self.grams.ids[here - 1] != ids[there - 1]) | (self.grams.ids[here - 1] == END)
        first &= self.longest[texts] < self.lengths[texts]
        for p, j, text in zip(here[first], there[first], texts[first], strict=True):
            room = min(self.ends[text] - p, ends[np.searchsorted(ends, j)] - j)
            same = self.grams.ids[p : p + room] == ids[j : j + room]
            wrong = np.flatnonzero(~same)
            run = wrong[0] if len(wrong) else room
            self.longest[text] = max(self.longest[text], run)
            stop = wrong[LLAMA_SKIPS] if len(wrong) > LLAMA_SKIPS else room
            span = np.flatnonzero(same[:stop])[-1] + 1
            if span > LLAMA_EXACT:
                self.inside[p : p + span] = True

    def exposures(self, ngram_words: int) -> list[Exposure]:
        """Returns the scores of each text."""
        longest = np.zeros_like(self.longest)
        for n, (names, places) in enumerate(zip(self.grams.names, self.grams.places, strict=True), start=1):
            longest[self.grams.owner[places[self.seen[n - 1][names]]]] = n
        longest = np.maximum(longest, self.longest)
        inside = np.bincount(self.grams.owner, self.inside, len(self.lengths))
        ngrams, eightgrams = self._hits(ngram_words), self._hits(PALM_WORDS)
        return [
            Exposure(
                words=int(length),
                ngram=bool(ngrams[i]) if length >= ngram_words else None,
                eightgrams=float(eightgrams[i] / (length - PALM_WORDS + 1)) if length >= PALM_WORDS else None,
                matched=float(inside[i] / length) if length > LLAMA_EXACT else None,
                longest=int(longest[i]),
            )
            for i, length in enumerate(self.lengths)
        ]

    def _hits(self, n: int) -> np.ndarray:
        """Returns how many n-grams of each text have been seen, each as often as it stands there."""
        if n > len(self.seen):
            return np.zeros(len(self.lengths))
        seen = self.seen[n - 1][self.grams.names[n - 1]]
        return np.bincount(self.grams.owner[self.grams.places[n - 1]], seen, len(self.lengths))


def read_documents(shards: Sequence[Path]) -> Iterator[str]:
    """Returns the documents of corpus files, read as they are asked for.

    A `.txt` has one a line, a `.jsonl`, or `.json` as C4 calls it, one as "text" of each line; either may be packed as
    `.gz`.

    Raises:
        UserError: A file is missing or of another kind, which is seen at once; or, when its turn comes, it cannot be
            read, has no document, or a malformed line.
    """
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{shard}: no such corpus file")
        if _kind(shard) not in (".txt", ".jsonl", ".json"):
            raise UserError(f"{shard}: a corpus file ends in .txt, .jsonl or .json, or in one of them and .gz")
    return itertools.chain.from_iterable(map(_documents, shards))


def _kind(shard: Path) -> str:
    return Path(shard.stem).suffix if shard.suffix == ".gz" else shard.suffix


def _documents(shard: Path) -> Iterator[str]:
    found = False
    try:
        with (
            gzip.open(shard, "rt", encoding="utf-8") if shard.suffix == ".gz" else shard.open(encoding="utf-8") as file
        ):
            for number, line in enumerate(file, start=1):
                if line.strip():
                    found = True
                    yield line if _kind(shard) == ".txt" else _text(shard, number, line)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{shard}: cannot be read ({error})") from None
    if not found:
        raise UserError(f"{shard}: no document in it")


def _text(shard: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{shard}: malformed JSON at line {number} column {error.colno}: {error.msg}") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(f'{shard}: line {number} has no "text" that is a string')
    return row["text"]
