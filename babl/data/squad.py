"""Questions with contexts and gold answers, read from files for two uses.

*Scoring* (`load_golds`) looks at ids and gold texts alone, as the official scripts do. *PromptLimits and training*
(`load_squad`) also need to know where a context says its answer: each one is placed (`babl.data.placing`), the gold
text stays what is scored, and the context's own words are what is trained on and highlighted.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from babl.data.formats import Records, nameless, read_records
from babl.data.placing import PLACE_KINDS, place
from babl.errors import UserError
from babl.text.normalize import without_surrogates

Version = Literal["1.1", "2.0"]
SHOWN = 5  # places of a list of faults


@dataclass(frozen=True, slots=True)
class Answer:
    """A gold answer.

    Attributes:
        text: As the file has it: what is scored.
        start: Code point of the context at which the context says it; None where it does not.
        end: Code point after that; where not given, as far as the text is long.
    """

    text: str
    start: int | None
    end: int | None = None

    def __post_init__(self) -> None:
        if self.start is not None and self.end is None:
            object.__setattr__(self, "end", self.start + len(self.text))

    @property
    def span(self) -> tuple[int, int] | None:
        """Code points [start, end) at which the context says it."""
        return None if self.start is None or self.end is None else (self.start, self.end)


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one context.

    Attributes:
        id: Unique in its file.
        title: Of the article; questions of one article are not independent.
        question: x.
        context: c; empty where the question has none.
        answers: y, every gold; none where the context does not answer the question.
        grade: Difficulty, where the file tells (`fictional.GRADES`), else empty.
        version: Of SQuAD, whose rules the file is scored by.
    """

    id: str
    title: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    grade: str = ""
    version: Version = "1.1"

    @property
    def impossible(self) -> bool:
        """Whether the context does not answer the question."""
        return not self.answers

    @property
    def span(self) -> tuple[int, int] | None:
        """Code points [start, end) at which the context says the first answer that it says at all."""
        return next((answer.span for answer in self.answers if answer.span), None)

    @property
    def target(self) -> str | None:
        """What a model is trained to write: the context's own words, or the first gold; None where there is no answer.

        It is the same in every arm, whether or not the arm shows the context.
        """
        if self.span:
            return self.context[slice(*self.span)]
        return self.answers[0].text if self.answers else None


@dataclass(frozen=True)
class Reading:
    """How a file is read where it is at odds with itself.

    Attributes:
        strict: Whether an answer that is not at its offset, character by character, is an error.
        faulty: Whether a record that cannot be read is an error, or left out.
        impossible: Whether answers beside `is_impossible: true`, or empty ones, are an error, or read as no answer.
        articles: What makes two questions ones of one article: their title, or their context.
    """

    strict: bool = False
    faulty: Literal["refuse", "leave-out"] = "refuse"
    impossible: Literal["refuse", "unanswerable"] = "refuse"
    articles: Literal["title", "context"] = "title"


def load_squad(
    path: str | Path, reading: Reading | None = None, tell: Callable[[str], object] = lambda line: None
) -> list[Example]:
    """Returns the questions of a file, of a folder's files, or of those a pattern with * names, each answer placed.

    The shapes are those of `babl.data.formats`. Answers are texts, SQuAD's `{"text", "answer_start"}`, or
    `{"text": [...], "answer_start": [...]}`; `"answer"` may stand for one. Without an id, the place in the file is the
    id. Without a title, questions about the same context count as one article.

    Args:
        path: Of the file, folder or pattern.
        reading: How.
        tell: Takes the line that says how many answers were placed in which way, and what was left out.

    Raises:
        UserError: The file cannot be read, or records of it cannot; all are counted, the first five named.
    """
    return _examples(path, read_records(path), reading or Reading(), tell)


def parse_squad(tree: Any, source: str | Path) -> list[Example]:
    """Returns the questions of a parsed SQuAD file; errors name `source` and are those of `load_squad`."""
    records = Records(version=str(tree.get("version", "")) if isinstance(tree, dict) else "")
    records.add("", tree, {})
    return _examples(source, records, Reading(), lambda line: None)


def load_golds(
    path: str | Path, reading: Reading | None = None, tell: Callable[[str], object] = lambda line: None
) -> list[Example]:
    """Returns what scoring needs of a file of `load_squad`: ids, titles and gold texts, which are not looked for.

    A contradiction between `is_impossible` and the answers is none here: the official scripts read the answers alone.

    Args:
        path: Of the file, folder or pattern.
        reading: How.
        tell: Takes the line that says what was left out, where anything was.

    Raises:
        UserError: As `load_squad`; never for an answer's place, or a missing question or context.
    """
    reading, counts = reading or Reading(), Counter[str]()
    golds = _collected(path, read_records(path), reading, lambda where, row: _parsed(where, row, reading), counts)
    if counts["left out"]:
        tell(f"{path}: {len(golds)} questions; {counts['left out']} records left out that cannot be read")
    return golds


class _Fault(Exception):
    """What is wrong with one record, in words, its place included."""


def _examples(source: str | Path, records: Records, reading: Reading, tell: Callable[[str], object]) -> list[Example]:
    counts: Counter[str] = Counter()
    astray: list[str] = []

    def read(where: str, row: Mapping[str, Any]) -> Example:
        example = _parsed(where, row, reading)
        if not isinstance(row.get("question"), str):
            raise _Fault(_found(f"{where}.question", row.get("question"), "a string"))
        example = _without_empty(where, row, example, reading, counts)
        return replace(example, answers=tuple(_placed(where, example, counts, astray)))

    examples = _collected(source, records, reading, read, counts)
    if reading.strict and astray:
        raise UserError(
            f"{source}: {len(astray)} of {counts['answers']} answers do not stand where the file says: "
            f"{_counted(counts)}; first {'; '.join(astray[:SHOWN])}; mend them, or read the file without strict"
        )
    tell(_summary(source, len(examples), counts))
    return examples


def _collected(
    source: str | Path,
    records: Records,
    reading: Reading,
    read: Callable[[str, Mapping[str, Any]], Example],
    counts: Counter[str],
) -> list[Example]:
    """Returns an example for each record; what cannot be read is told together, or left out and counted."""
    examples: list[Example] = []
    faults, seen = list(records.faults), dict[str, str]()
    if not records.rows and len(faults) <= 1:
        raise UserError(f"{source}: {faults[0] if faults else 'no question in it'}")
    for where, row in records.rows:
        try:
            example = read(where, row)
            if example.id in seen:
                raise _Fault(f"id {example.id} at {where} stands already at {seen[example.id]}")
        except _Fault as fault:
            faults.append(str(fault))
            continue
        seen[example.id] = where
        examples.append(example)
    total = len(records.rows) + len(records.faults)
    if faults and reading.faulty == "refuse":
        raise UserError(f"{source}: {_told(faults, total, counts)}")
    if not examples:
        raise UserError(f"{source}: none of {total} records can be read: {faults[0]}")
    counts["left out"] = len(faults)
    if "2.0" in records.version or any(example.impossible for example in examples):
        return [replace(example, version="2.0") for example in examples]
    return examples


def _told(faults: Sequence[str], records: int, counts: Counter[str]) -> str:
    """Returns the faults of a file in one line: their number, the first ones, and what to do."""
    many = f"{len(faults)} of {records} records cannot be read: " if len(faults) > 1 else ""
    more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    advice = "mend what is wrong, or leave it out with data.faulty=leave-out (--faulty leave-out)"
    if counts["contradictions"] or counts["empty"]:
        advice += ", or read no answer there with data.impossible=unanswerable (--impossible unanswerable)"
    return f"{many}{'; '.join(faults[:SHOWN])}{more}; {advice}"


def _parsed(where: str, row: Mapping[str, Any], reading: Reading) -> Example:
    """Returns the example with answers as the file has them, at the offsets that it says, which may be wrong."""
    qid = row.get("id", row.get("qid"))
    if qid is None or qid == "":
        qid = where.replace(" ", "-")
    elif isinstance(qid, bool) or not isinstance(qid, str | int):
        raise _Fault(_found(f"{where}.id", qid, "a string or an integer"))
    question, context, grade = (row.get(name) for name in ("question", "context", "grade"))
    if not isinstance(context, str | None):
        raise _Fault(_found(f"{where}.context", context, "a string"))
    context = without_surrogates(context or "")
    title = row.get("title")
    if reading.articles == "context" or title is None or not str(title).strip():
        title = nameless(context or str(question or qid))
    answers = tuple(Answer(without_surrogates(text), start) for text, start in _golds(where, row))
    names = ("" if value is None else without_surrogates(str(value)) for value in (qid, title, question, grade))
    qid, title, question, grade = names
    return Example(qid, title, question, context, answers, grade)


def _golds(where: str, row: Mapping[str, Any]) -> Iterator[tuple[str, int | None]]:
    """Yields text and offset of each answer of a record, None where it says none."""
    if "answers" not in row and "answer" in row:
        alone = row["answer"]
        found: Any = [] if alone in (None, "") else [{"text": alone, "answer_start": row.get("answer_start")}]
    else:
        found = row.get("answers")
    if isinstance(found, dict):
        texts, starts = found.get("text"), found.get("answer_start")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list):
            raise _Fault(_found(f"{where}.answers.text", texts, "a list of strings"))
        starts = starts if isinstance(starts, list) else [starts] * len(texts) if len(texts) < 2 or not starts else []
        if len(texts) != len(starts):
            raise _Fault(f"{where}.answers: {len(texts)} texts but {len(starts)} offsets")
        found = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(found, list):
        if found is None and "answers" in row:
            raise _Fault(f'{where}.answers is null; no answer is "answers": []')
        raise _Fault(_found(f"{where}.answers", found, "a list"))
    detected = _detected(row)
    for i, entry in enumerate(found):
        at = f"{where}.answers[{i}]"
        text, start = (entry.get("text"), entry.get("answer_start")) if isinstance(entry, dict) else (entry, None)
        if not isinstance(text, str):
            raise _Fault(_found(at, text, "a text"))
        if isinstance(start, float) and start.is_integer():  # pandas makes floats of a column with a gap
            start = int(start)
        if start is not None and (isinstance(start, bool) or not isinstance(start, int)):
            raise _Fault(_found(f"{at}.answer_start", start, "an integer"))
        yield text, detected.get(text, start)


def _detected(row: Mapping[str, Any]) -> dict[str, int]:
    """Returns where MRQA says that answers begin."""
    try:
        return {each["text"]: int(each["char_spans"][0][0]) for each in row["detected_answers"]}
    except (KeyError, IndexError, TypeError, ValueError):  # another shape, or another data set: there are no offsets
        return {}


def _without_empty(
    where: str, row: Mapping[str, Any], example: Example, reading: Reading, counts: Counter[str]
) -> Example:
    """Returns the example without answers that say there is none, if all of the record says so."""
    flagged = str(row.get("is_impossible", "")).lower() in ("true", "1")
    said = tuple(answer for answer in example.answers if answer.text.strip())
    if flagged and said:
        counts["contradictions"] += 1
        if reading.impossible == "refuse":
            raise _Fault(f"{where} of {example.id} is_impossible, but has the answer {_short(said[0].text)}")
        said = ()
    elif len(said) < len(example.answers):
        counts["empty"] += 1
        if not flagged and reading.impossible == "refuse":
            raise _Fault(f'{where} of {example.id} has an empty answer, where no answer is "answers": []')
    return replace(example, answers=said)


def _placed(where: str, example: Example, counts: Counter[str], astray: list[str]) -> Iterator[Answer]:
    """Yields the answers where the context says them; those that are not where the file says are counted and named."""
    if not example.context:
        counts["without context"] += 1
        yield from (Answer(answer.text, None) for answer in example.answers)
        return
    for i, answer in enumerate(example.answers):
        found = place(answer.text, answer.start, example.context)
        counts["answers"] += 1
        counts[found.kind] += 1
        counts["ambiguous"] += found.ambiguous
        if found.kind != "exact":
            offset = "" if answer.start is None else f" at offset {answer.start}"
            said = "" if found.start is None else _short(example.context[found.start : found.end])
            form = " in other spaces or another Unicode form" if found.kind == "whitespace" else ""
            there = f", but {said}{form} at {found.start}" if said else ""
            astray.append(f"{where}.answers[{i}] of {example.id}: no {_short(answer.text)}{offset}{there}")
        yield Answer(answer.text, found.start, found.end)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[kind]} {kind}" for kind in PLACE_KINDS)


def _summary(source: str | Path, questions: int, counts: Counter[str]) -> str:
    """Returns how many answers were placed in which way, and what else was not as it should be."""
    further = {
        "ambiguous": "without an offset in several places, the first one taken",
        "without context": "questions without a context",
        "contradictions": "is_impossible beside answers, read as unanswerable",
        "empty": "with empty answers, left out",
        "left out": "records left out that cannot be read",
    }
    more = "".join(f"; {counts[key]} {words}" for key, words in further.items() if counts[key])
    return f"{source}: {questions} questions, {counts['answers']} answers: {_counted(counts)}{more}"


def _found(at: str, value: Any, expected: str) -> str:
    """Returns what is wrong with a field."""
    return f"{at} is missing" if value is None else f"{at}: expected {expected}, found {type(value).__name__}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def to_squad(examples: Sequence[Example]) -> dict[str, Any]:
    """Returns the examples as a parsed SQuAD file in their order, of the version that they are scored by.

    An answer that the context does not say has the offset -1.
    """
    version: Version = "2.0" if any(e.impossible or e.version == "2.0" for e in examples) else "1.1"
    data = []
    for title, article in itertools.groupby(examples, lambda e: e.title):
        paragraphs = []
        for context, questions in itertools.groupby(article, lambda e: e.context):
            qas = [_question(example, version) for example in questions]
            paragraphs.append({"context": context, "qas": qas})
        data.append({"title": title, "paragraphs": paragraphs})
    return {"version": "v2.0" if version == "2.0" else "1.1", "data": data}


def _question(example: Example, version: Version) -> dict[str, Any]:
    answers = [{"text": a.text, "answer_start": -1 if a.start is None else a.start} for a in example.answers]
    qa: dict[str, Any] = {"id": example.id, "question": example.question, "answers": answers}
    qa |= {"is_impossible": example.impossible} if version == "2.0" else {}
    return qa | ({"grade": example.grade} if example.grade else {})
