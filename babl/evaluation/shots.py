"""Worked examples that stand before every question: what a model does that has seen the task, and learned nothing."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from babl.data.articles import articles
from babl.data.contexts import View
from babl.data.squad import Example
from babl.errors import UserError
from babl.text import Tokenizer
from babl.text.normalize import normalize_answer
from babl.text.prompts import Message, Style, prompt_ids, qa_target, worked_example


def draw_shots(
    train: Sequence[Example], test: Sequence[Example], number: int, seed: int | None = None
) -> list[Example]:
    """Returns questions to be shown with their answers, each of another article, none of an article of the test set.

    Of an article it is the question with the shortest context, the first of several: short examples leave room. A
    smaller number gives the first of a greater one's.

    Args:
        train: Where they are drawn from.
        test: What is asked.
        number: How many.
        seed: Of the order of the articles; None for that of their names.

    Raises:
        UserError: There are fewer articles.
    """
    names = articles([*test, *train])
    tested = set(names[: len(test)])
    shortest: dict[str, Example] = {}
    for example, name in zip(train, names[len(test) :], strict=True):
        usable = name not in tested and (example.impossible or example.span)
        if usable and (name not in shortest or len(example.context) < len(shortest[name].context)):
            shortest[name] = example
    if len(shortest) < number:
        raise UserError(
            f"--shots is {number}, but the training file has examples of {len(shortest)} articles that are not tested"
        )

    def place(name: str) -> tuple[str, str]:
        return "" if seed is None else hashlib.sha256(f"{seed}/{name}".encode()).hexdigest(), name

    return [shortest[name] for name in sorted(shortest, key=place)[:number]]


@dataclass(frozen=True)
class Shots:
    """The worked examples of an evaluation.

    Attributes:
        before: What stands before every question, the examples last.
        tokens: That the examples take.
        ids: Of the examples shown.
        asked: How many were to be shown.
        left_out: Why others are not, a line each.
        style: Wording of the questions.
    """

    before: tuple[Message, ...]
    tokens: int
    ids: list[str]
    asked: int
    left_out: list[str]
    style: Style

    def facts(self, questions: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the metrics of a parsed SQuAD file say of them; shots_answer counts golds they give away."""
        digest = hashlib.sha256(json.dumps(self.before, ensure_ascii=False).encode()).hexdigest()
        return {
            "shots": len(self.ids),
            "shots_asked": self.asked,
            "shots_tokens": self.tokens,
            "shots_ids": self.ids,
            "shots_sha256": digest,
            "shots_answer": self._given(questions),
        }

    def _given(self, questions: Mapping[str, Any]) -> int:
        """Returns how many questions have a gold that is the answer of an example."""
        said = {normalize_answer(m["content"]) for m in self.before if m["role"] == "assistant"}
        said.discard(normalize_answer(qa_target(None, self.style)))
        qas = [qa for article in questions["data"] for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
        return sum(any(normalize_answer(answer["text"]) in said for answer in qa["answers"]) for qa in qas)


def show_shots(
    drawn: Sequence[Example],
    views: Sequence[View],
    missing: Mapping[str, str],
    told: Sequence[Message],
    tokenizer: Tokenizer,
    style: Style,
    room: int | None,
) -> Shots:
    """Returns examples as their arm shows them, as many as there is room for, the first ones.

    Args:
        drawn: From `draw_shots`.
        views: Of their set, in the arm of the questions.
        missing: Question id -> why the arm has no view of it; such an example is left out.
        told: What stands before them.
        tokenizer: Counts the tokens.
        style: Wording of the questions.
        room: Most tokens of all examples; None for any number.
    """
    of = {view.id: view for view in views}
    shown = [of[example.id] for example in drawn if example.id in of]
    left_out = [f"{each.id} is not shown: {missing[each.id]}" for each in drawn if each.id not in of]
    turns = [worked_example(view.question, view.context, view.target, style) for view in shown]
    before, tokens = tuple(told), 0
    for count in range(1, len(turns) + 1):
        longer = (*told, *itertools.chain.from_iterable(turns[:count]))
        taken = _tokens(longer, tokenizer, style) - _tokens(told, tokenizer, style)
        if room is not None and taken > room:
            left_out.append(
                f"{count - 1} of {len(turns)} examples are shown; {count} take {taken} tokens, and beside the question "
                f"and its answer the model has room for {max(0, room)}"
            )
            shown = shown[: count - 1]
            break
        before, tokens = longer, taken
    return Shots(before, tokens, [view.id for view in shown], len(drawn), left_out, style)


def _tokens(before: Sequence[Message], tokenizer: Tokenizer, style: Style) -> int:
    return len(prompt_ids(["?"], tokenizer, style, before)[0])
