"""SQuAD 1.1 and 2.0 files and JSON lines, read strictly: an answer stands where the file says, or nothing is read."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babl.errors import UserError


@dataclass(frozen=True, slots=True)
class Answer:
    """A gold answer and the code point of the context at which it begins."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one context.

    Attributes:
        id: Unique in its file.
        title: Of the article; questions of one article are not independent.
        question: x.
        context: c.
        answers: y, every gold; none where the context does not answer the question.
        grade: Difficulty, where the file tells (`fictional.GRADES`), else empty.
    """

    id: str
    title: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    grade: str = ""

    @property
    def impossible(self) -> bool:
        """Whether the context does not answer the question."""
        return not self.answers


def load_squad(path: str | Path) -> list[Example]:
    """Returns the questions of a file in SQuAD's JSON format, or with one JSON object a line.

    A line is `{"question", "context", "answers" | "answer", "id"?, "title"?}`, answers being texts, SQuAD's
    `{"text", "answer_start"}`, or `{"text": [...], "answer_start": [...]}`. An answer without an offset is looked up in
    its context. Without a title, lines of the same context count as one article.

    Raises:
        UserError: The file cannot be read, has another schema, an answer that is not at its offset, or an id twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such data file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    if not _is_squad(text):
        return _collected(path, _lines(path, text))
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: malformed JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
    return parse_squad(tree, path)


def parse_squad(tree: Any, source: str | Path) -> list[Example]:
    """Returns the questions of a parsed SQuAD file; errors name `source` and are those of `load_squad`."""
    return _collected(source, _squad(source, tree))


def _collected(source: str | Path, found: Iterator[tuple[str, Example]]) -> list[Example]:
    examples: list[Example] = []
    seen: dict[str, str] = {}
    for where, example in found:
        if example.id in seen:
            raise UserError(f"{source}: id {example.id} at {where} stands already at {seen[example.id]}")
        seen[example.id] = where
        examples.append(example)
    if not examples:
        raise UserError(f"{source}: no question in it")
    return examples


def _is_squad(text: str) -> bool:
    """Whether the text is to be read as one JSON value: lines each close what they open, a SQuAD file need not."""
    first = text.lstrip().split("\n", 1)[0]
    try:
        return "data" in json.loads(first)
    except (ValueError, TypeError):
        return '"question"' not in first or '"data"' in first


def _squad(path: str | Path, tree: Any) -> Iterator[tuple[str, Example]]:
    for i, article in enumerate(_get(path, "", tree, "data", list)):
        at = f"data[{i}]"
        title = _get(path, at, article, "title", str)
        for j, paragraph in enumerate(_get(path, at, article, "paragraphs", list)):
            at_paragraph = f"{at}.paragraphs[{j}]"
            context = _get(path, at_paragraph, paragraph, "context", str)
            for k, qa in enumerate(_get(path, at_paragraph, paragraph, "qas", list)):
                where = f"{at_paragraph}.qas[{k}]"
                qid, question = _get(path, where, qa, "id", str), _get(path, where, qa, "question", str)
                answers = _answers(path, where, qid, context, _get(path, where, qa, "answers", (list, dict)))
                yield where, Example(qid, title, question, context, answers, qa.get("grade", ""))


def _lines(path: Path, text: str) -> Iterator[tuple[str, Example]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: malformed JSON at {where} column {error.colno}: {error.msg}") from None
        question, context = _get(path, where, row, "question", str), _get(path, where, row, "context", str)
        qid = row.get("id", f"line-{number}")
        title = row.get("title") or hashlib.sha256(context.encode()).hexdigest()[:12]
        for name, value in (("id", qid), ("title", title)):
            if not isinstance(value, str):
                raise UserError(f"{path}: {where}.{name}: expected a string, found {type(value).__name__}")
        if "answer" in row:
            answer = _get(path, where, row, "answer", str)
            found: list | dict = [answer] if answer else []
        else:
            found = _get(path, where, row, "answers", (list, dict))
        yield where, Example(qid, title, question, context, _answers(path, where, qid, context, found))


def _answers(path: str | Path, where: str, qid: str, context: str, found: list | dict) -> tuple[Answer, ...]:
    """Returns the answers, each verified against its context."""
    if isinstance(found, dict):
        texts, starts = _get(path, where, found, "text", list), _get(path, where, found, "answer_start", list)
        if len(texts) != len(starts):
            raise UserError(f"{path}: {where}.answers: {len(texts)} texts but {len(starts)} offsets")
        found = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    answers = []
    for i, entry in enumerate(found):
        at = f"{where}.answers[{i}]"
        if isinstance(entry, str):
            start = context.find(entry)
            if start < 0:
                raise UserError(f"{path}: {at} of {qid}: {_short(entry)} is nowhere in the context")
            answers.append(Answer(entry, start))
            continue
        text, start = _get(path, at, entry, "text", str), _get(path, at, entry, "answer_start", int)
        there = context[start : start + len(text)] if start >= 0 else ""
        if there != text or not text:
            raise UserError(f"{path}: {at} of {qid}: expected {_short(text)} at offset {start}, found {_short(there)}")
        answers.append(Answer(text, start))
    return tuple(answers)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


_WORDS = {str: "a string", int: "an integer", list: "a list", (list, dict): "a list"}


def _get(path: str | Path, where: str, tree: Any, key: str, kind: Any) -> Any:
    """Returns tree[key], where it is there and of that kind."""
    at = f"{where}.{key}" if where else key
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {where or 'top level'}: expected an object, found {type(tree).__name__}")
    if key not in tree:
        raise UserError(f"{path}: {at} is missing")
    if not isinstance(tree[key], kind) or isinstance(tree[key], bool):
        raise UserError(f"{path}: {at}: expected {_WORDS[kind]}, found {type(tree[key]).__name__}")
    return tree[key]


def to_squad(examples: Sequence[Example]) -> dict[str, Any]:
    """Returns the examples as a parsed SQuAD file, of version 2.0 where one has no answer."""
    impossible = any(example.impossible for example in examples)
    articles: dict[str, dict[str, list]] = {}
    for example in examples:
        qa: dict[str, Any] = {
            "id": example.id,
            "question": example.question,
            "answers": [{"text": answer.text, "answer_start": answer.start} for answer in example.answers],
        }
        qa |= {"is_impossible": example.impossible} if impossible else {}
        qa |= {"grade": example.grade} if example.grade else {}
        articles.setdefault(example.title, {}).setdefault(example.context, []).append(qa)
    data = [
        {"title": title, "paragraphs": [{"context": context, "qas": qas} for context, qas in paragraphs.items()]}
        for title, paragraphs in articles.items()
    ]
    return {"version": "v2.0" if impossible else "1.1", "data": data}


def split_by_article(
    examples: Sequence[Example], fraction: float, seed: int, at_least: int = 1
) -> tuple[list[Example], list[Example]]:
    """Returns a training and a validation part that share no article.

    Articles enter the validation part in the order of a hash of their title, until it has its share of the questions.

    Args:
        examples: Of at least twice as many articles as each side must have.
        fraction: Share of the questions, in (0, 1).
        seed: Of the hash.
        at_least: Articles on each side.
    """
    titles = sorted({e.title for e in examples}, key=lambda t: hashlib.sha256(f"{seed}/{t}".encode()).digest())
    if len(titles) < 2 * at_least:
        raise UserError(f"a validation slice needs at least {2 * at_least} articles, the data has {len(titles)}")
    held: set[str] = set()
    for title in titles[:-at_least]:
        if len(held) >= at_least and sum(e.title in held for e in examples) >= fraction * len(examples):
            break
        held.add(title)
    return [e for e in examples if e.title not in held], [e for e in examples if e.title in held]
