"""The JSON that clients get of each row: of conversations, messages, passages, question sets and runs."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from babl.evaluation.squad import question_scores
from babl.web.chat.models import (
    GENERATION_COLUMNS,
    Conversation,
    Feedback,
    Generation,
    Message,
    Passage,
    QuestionSet,
    Run,
    Status,
)
from babl.web.chat.render import render, span_json

AS_STORED = [name for name in GENERATION_COLUMNS if name not in ("comparison", "span_start", "span_end", "finished")]


def conversation_json(conversation: Conversation) -> dict[str, Any]:
    """Returns a conversation without its messages."""
    return {
        "id": str(conversation.id),
        "title": conversation.title,
        "system_prompt": conversation.system_prompt,
        "model": conversation.model,
        "settings": conversation.settings,
        "passage": str(conversation.passage_id) if conversation.passage_id else None,
        "leaf": str(conversation.leaf_id) if conversation.leaf_id else None,
        "archived": conversation.archived is not None,
        "deleted": conversation.deleted is not None,
        "created": conversation.created.isoformat(),
        "updated": conversation.updated.isoformat(),
    }


def passage_json(passage: Passage, text: bool = True) -> dict[str, Any]:
    """Returns a passage."""
    row = {"id": str(passage.id), "title": passage.title, "sha256": passage.sha256}
    row["created"] = passage.created.isoformat()
    return row | ({"text": passage.text} if text else {})


def message_json(message: Message, html: Mapping[UUID, str | None] | None = None) -> dict[str, Any]:
    """Returns a message; an answer with its status, its place in the passage and, if golds are known, its scores.

    Args:
        message: With its related rows.
        html: Of answers, by id, where they are rendered together; None renders this one.
    """
    row: dict[str, Any] = {
        "id": str(message.id),
        "parent": str(message.parent_id) if message.parent_id else None,
        "role": message.role,
        "content": message.content,
        "created": message.created.isoformat(),
    }
    if message.role == Message.Role.USER:
        passage = passage_json(message.passage, text=False) if message.passage else None
        return row | {"passage": passage, "golds": message.golds}
    row["html"] = render([message.content])[0] if html is None else html[message.id]
    return row | generation_json(message.generation) | {"feedback": feedback_json(getattr(message, "feedback", None))}


def generation_json(generation: Generation) -> dict[str, Any]:
    """Returns how an answer came about, its place in the passage and its scores; part of `message_json`."""
    question = generation.message.parent
    passage = question.passage if question else None
    asked_in = passage if generation.kind != Generation.Kind.COMPLETION and generation.with_context else None
    span = span_json(asked_in.text, generation.span_start, generation.span_end) if asked_in else None
    done = generation.status == Status.DONE
    golds = question.golds if done and question else None
    tokens, seconds = generation.tokens, generation.seconds
    return {name: getattr(generation, name) for name in AS_STORED} | {
        "comparison": str(generation.comparison) if generation.comparison else None,
        "passage": str(asked_in.id) if asked_in else None,
        "span": span,
        "in_passage": span is not None if asked_in and done and generation.message.content else None,
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
        "scores": None if golds is None else score(generation.message.content, golds),
    }


def score(answer: str, golds: Sequence[str]) -> dict[str, float]:
    """Returns the official SQuAD 2.0 scores of an answer, in percent; a question without golds has no answer."""
    answers = [{"text": gold, "answer_start": 0} for gold in golds]
    qa = {"id": "it", "question": "", "answers": answers}
    dataset = {"version": "v2.0", "data": [{"title": "", "paragraphs": [{"context": "", "qas": [qa]}]}]}
    (found,) = question_scores(dataset, {"it": answer}, version="2.0").values()
    return {"exact": 100 * found.exact, "f1": 100 * found.f1}


def feedback_json(given: Feedback | None) -> dict[str, Any] | None:
    """Returns the user's feedback on an answer."""
    if given is None:
        return None
    span = None if given.right_start is None else {"start": given.right_start, "end": given.right_end}
    return {"good": given.good, "span": span, "no_answer": given.no_answer, "note": given.note}


def set_json(question_set: QuestionSet) -> dict[str, Any]:
    """Returns a question set with its runs."""
    return {
        "id": str(question_set.id),
        "name": question_set.name,
        "created": question_set.created.isoformat(),
        "questions": question_set.questions.count(),
        "runs": [run_json(each) for each in question_set.runs.select_related("set").order_by("-id")],
    }


def run_json(run: Run) -> dict[str, Any]:
    """Returns a run with its mean scores so far, in percent."""
    scores = list(run.answers.values_list("exact", "f1"))
    return {
        "id": str(run.id),
        "set": str(run.set_id),
        "model": run.model,
        "with_context": run.with_context,
        "status": run.status,
        "error_message": run.error_message,
        "weights": run.weights,
        "created": run.created.isoformat(),
        "answered": len(scores),
        "skipped": run.answers.exclude(skipped="").count(),
        "questions": run.set.questions.count(),
        "exact": 100 * sum(e for e, _ in scores) / len(scores) if scores else None,
        "f1": 100 * sum(f for _, f in scores) / len(scores) if scores else None,
    }
