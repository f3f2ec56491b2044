"""Every read. Each takes the user first and knows nothing of what others own: a foreign id is an unknown id."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import chain, islice
from typing import Any
from uuid import UUID

import msgspec
from django.contrib.postgres.search import SearchQuery, SearchVector
from django.db import connection
from django.db.models import Q, QuerySet

from babl.errors import UserError
from babl.evaluation.squad import question_scores
from babl.web.chat.models import (
    ApiKey,
    Conversation,
    Feedback,
    Generation,
    Message,
    Passage,
    Question,
    QuestionSet,
    Run,
    Status,
)
from babl.web.chat.render import render, span_json
from babl.web.engine.protocol import ChatRequest, CompletionRequest, QARequest, Request, Settings
from babl.web.engine.protocol import Message as Turn

PAGE = 40  # messages shown at first
LIST = 50  # conversations of a page of the list
WORDS = 32  # of a search
EXCERPT = 60  # characters to each side of what was searched for
FACTS = (  # of a generation, told as they are
    *("kind", "model", "with_context", "settings", "status", "finish", "error", "error_message", "prompt_tokens"),
    *("cut_tokens", "windows", "tokens", "log_prob", "probability", "first_seconds", "seconds", "weights", "tokenizer"),
)


def conversations(
    user: Any, kind: str = "active", before: tuple[datetime, UUID] | None = None, limit: int = LIST
) -> list[Conversation]:
    """Returns a page of the user's conversations, those changed last first.

    Args:
        user: Owner.
        kind: "active", "archived" or "trash".
        before: `updated` and id of the last one of the page before.
        limit: Of the page.
    """
    found = Conversation.objects.filter(owner=user, deleted__isnull=kind != "trash")
    if kind != "trash":
        found = found.filter(archived__isnull=kind == "active")
    if before:
        found = found.filter(Q(updated__lt=before[0]) | Q(updated=before[0], id__lt=before[1]))
    return list(found.order_by("-updated", "-id")[:limit])


def conversation(user: Any, id: UUID) -> Conversation:
    """Returns the user's conversation.

    Raises:
        Conversation.DoesNotExist: There is none of that id, or it is another's.
    """
    return Conversation.objects.select_related("passage").get(owner=user, id=id)


def message(user: Any, id: UUID) -> Message:
    """Returns the user's message, its conversation and generation with it."""
    return Message.objects.select_related("conversation", "generation", "parent__passage").get(
        conversation__owner=user, id=id
    )


def generation(user: Any, id: UUID) -> Generation:
    """Returns how the user's answer of that id comes about."""
    return Generation.objects.select_related("message__conversation", "message__parent").get(
        message__conversation__owner=user, message_id=id
    )


def passage(user: Any, id: UUID) -> Passage:
    """Returns the user's passage."""
    return Passage.objects.get(owner=user, id=id)


def passages(user: Any) -> QuerySet[Passage]:
    """Returns the user's passages, the newest first, without their text, and without those of question sets alone."""
    of_sets = Question.objects.filter(set__owner=user).values("passage_id")
    asked = Message.objects.filter(conversation__owner=user, passage__isnull=False).values("passage_id")
    attached = Conversation.objects.filter(owner=user, passage__isnull=False).values("passage_id")
    alone = Q(id__in=of_sets) & ~Q(id__in=asked) & ~Q(id__in=attached)
    return Passage.objects.filter(owner=user).exclude(alone).defer("text").order_by("-created")


def api_keys(user: Any) -> QuerySet[ApiKey]:
    """Returns the user's keys that are in force, the newest first."""
    return ApiKey.objects.filter(owner=user, revoked__isnull=True).order_by("-created")


def path(leaf: UUID | None, limit: int | None = None) -> list[Message]:
    """Returns the messages from the root to this one, or the last `limit` of them.

    The caller has made sure whose they are.
    """
    if leaf is None:
        return []
    deepest = "" if limit is None else f"WHERE depth < {limit - 1:d}"
    key = Message._meta.pk.get_db_prep_value(leaf, connection)
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            WITH RECURSIVE up(id, parent_id, depth) AS (
                SELECT id, parent_id, 0 FROM chat_message WHERE id = %s
                UNION ALL
                SELECT m.id, m.parent_id, up.depth + 1 FROM chat_message m JOIN up ON m.id = up.parent_id {deepest}
            )
            SELECT id FROM up ORDER BY depth DESC
            """,
            [key],
        )
        ids = [row[0] if isinstance(row[0], UUID) else UUID(row[0]) for row in cursor.fetchall()]
    found = Message.objects.select_related("generation", "feedback", "passage", "parent__passage").in_bulk(ids)
    return [found[id] for id in ids]


def newest_leaf(message: Message) -> UUID:
    """Returns the end of the branch that was last gone on with below this message."""
    id = message.id
    while (
        child := Message.objects.filter(parent_id=id).order_by("-created", "-id").values_list("id", flat=True).first()
    ):
        id = child
    return id


def thread(user: Any, id: UUID, before: UUID | None = None, limit: int = PAGE) -> dict[str, Any]:
    """Returns a page of what a conversation shows, `message_json`s from top to bottom, and whether there is more above.

    Args:
        user: Owner.
        id: Of the conversation.
        before: The topmost message shown so far; None for the page at the end.
        limit: Of the page.

    Raises:
        Message.DoesNotExist: `before` is in another conversation.
    """
    shown = conversation(user, id)
    leaf = shown.leaf_id
    if before is not None:
        leaf = Message.objects.get(conversation=shown, id=before).parent_id
    messages = path(leaf, limit)
    parents = {m.parent_id for m in messages}
    same_parent = Q(parent__in=parents - {None})
    if None in parents:
        same_parent |= Q(parent__isnull=True)
    siblings: dict[UUID | None, list[tuple[UUID, UUID | None]]] = defaultdict(list)
    rows = Message.objects.filter(same_parent, conversation=shown).order_by("created", "id")
    for parent, sibling, comparison in rows.values_list("parent_id", "id", "generation__comparison"):
        siblings[parent].append((sibling, comparison))
    beside: dict[UUID, list[Message]] = defaultdict(list)
    comparisons = {m.generation.comparison for m in messages if m.role == Message.Role.ASSISTANT} - {None}
    columns = Message.objects.filter(conversation=shown, generation__comparison__in=comparisons)
    for column in columns.select_related("generation", "feedback", "parent__passage").order_by("created", "id"):
        beside[column.generation.comparison].append(column)
    answers = [m for m in (*messages, *chain(*beside.values())) if m.role == Message.Role.ASSISTANT]
    html = dict(zip((m.id for m in answers), render([m.content for m in answers]), strict=True))
    found = []
    for m in messages:
        row = message_json(m, html)
        group = row.get("comparison")
        row["siblings"] = _siblings(m, siblings[m.parent_id])
        row["columns"] = [message_json(column, html) for column in beside[UUID(group)]] if group else []
        found.append(row)
    return {"messages": found, "more": bool(messages and messages[0].parent_id)}


def _siblings(m: Message, all_of_them: Sequence[tuple[UUID, UUID | None]]) -> list[str]:
    """Returns what can be shown in the message's place, itself included; answers side by side are one."""
    found: dict[UUID, UUID] = {}
    for id, comparison in all_of_them:
        place = comparison or id
        found[place] = m.id if id == m.id else found.get(place, id)
    return [str(id) for id in found.values()]


def conversation_json(shown: Conversation) -> dict[str, Any]:
    """Returns a conversation without its messages."""
    return {
        "id": str(shown.id),
        "title": shown.title,
        "system_prompt": shown.system_prompt,
        "model": shown.model,
        "settings": shown.settings,
        "passage": str(shown.passage_id) if shown.passage_id else None,
        "leaf": str(shown.leaf_id) if shown.leaf_id else None,
        "archived": shown.archived is not None,
        "deleted": shown.deleted is not None,
        "created": shown.created.isoformat(),
        "updated": shown.updated.isoformat(),
    }


def passage_json(shown: Passage, text: bool = True) -> dict[str, Any]:
    """Returns a passage."""
    row = {"id": str(shown.id), "title": shown.title, "sha256": shown.sha256, "created": shown.created.isoformat()}
    return row | ({"text": shown.text} if text else {})


def message_json(shown: Message, html: Mapping[UUID, str | None] | None = None) -> dict[str, Any]:
    """Returns a message; an answer with its state, its place in the passage and, where a gold is known, its scores.

    Args:
        shown: With what belongs to it.
        html: Of answers, by id, where a page has them rendered together. None: this one is rendered by itself.
    """
    row: dict[str, Any] = {
        "id": str(shown.id),
        "parent": str(shown.parent_id) if shown.parent_id else None,
        "role": shown.role,
        "content": shown.content,
        "created": shown.created.isoformat(),
    }
    if shown.role == Message.Role.USER:
        passage = passage_json(shown.passage, text=False) if shown.passage else None
        return row | {"passage": passage, "golds": shown.golds}
    row["html"] = render([shown.content])[0] if html is None else html[shown.id]
    return row | generation_json(shown.generation) | {"feedback": feedback_json(getattr(shown, "feedback", None))}


def generation_json(how: Generation) -> dict[str, Any]:
    """Returns what a message tells of how it came about."""
    question = how.message.parent
    passage = question.passage if question else None
    asked_in = passage if how.kind != Generation.Kind.COMPLETION and how.with_context else None
    span = span_json(asked_in.text, how.span_start, how.span_end) if asked_in else None
    done = how.status == Status.DONE
    return {name: getattr(how, name) for name in FACTS} | {
        "comparison": str(how.comparison) if how.comparison else None,
        "passage": str(asked_in.id) if asked_in else None,
        "span": span,
        "in_passage": span is not None if asked_in and done and how.message.content else None,
        "tokens_per_second": how.tokens / how.seconds if how.tokens and how.seconds else None,
        "scores": score(how.message.content, question.golds)
        if done and question and question.golds is not None
        else None,
    }


def score(answer: str, golds: Sequence[str]) -> dict[str, float]:
    """Returns the official SQuAD 2.0 scores of an answer, in percent; no gold means that none is right."""
    answers = [{"text": gold, "answer_start": 0} for gold in golds]
    qa = {"id": "it", "question": "", "answers": answers}
    dataset = {"version": "v2.0", "data": [{"title": "", "paragraphs": [{"context": "", "qas": [qa]}]}]}
    (found,) = question_scores(dataset, {"it": answer}, version="2.0").values()
    return {"exact": 100 * found.exact, "f1": 100 * found.f1}


def feedback_json(given: Feedback | None) -> dict[str, Any] | None:
    """Returns what the user thinks of an answer."""
    if given is None:
        return None
    span = None if given.right_start is None else {"start": given.right_start, "end": given.right_end}
    return {"good": given.good, "span": span, "no_answer": given.no_answer, "note": given.note}


def request(answer: Generation) -> Request:
    """Returns what the engine is asked for this answer.

    Raises:
        msgspec.ValidationError: Its settings are not `Settings`, stored before they were checked.
    """
    question, conversation = answer.message.parent, answer.message.conversation
    passage = question.passage if answer.with_context else None
    turns = history(path(question.id)) if answer.kind == Generation.Kind.CHAT else []
    return _request(
        str(answer.message_id),
        conversation,
        str(answer.kind),
        answer.model,
        question.content,
        passage,
        turns,
        msgspec.convert(answer.settings, Settings),
    )


def draft_request(
    user: Any,
    id: UUID | None,
    parent: UUID | None,
    kind: str,
    model: str,
    content: str,
    passage: UUID | None,
    how: Settings,
) -> Request:
    """Returns what the engine would be asked, were this question sent now; nothing is stored.

    Args:
        user: Owner.
        id: Of the conversation; None for a new one.
        parent: The answer that the question would follow.
        kind: Of `Generation.Kind`.
        model: Who would answer.
        content: The question.
        passage: What it is about.
        how: Settings of the answer.
    """
    shown = conversation(user, id) if id else Conversation(owner=user)
    about = Passage.objects.get(owner=user, id=passage) if passage else None
    question = Message(role=Message.Role.USER, content=content)
    earlier = []
    if parent is not None and kind == Generation.Kind.CHAT:
        earlier = path(Message.objects.get(conversation=shown, id=parent).id)
    return _request("draft", shown, kind, model, content, about, history([*earlier, question]), how)


def _request(
    id: str,
    shown: Conversation,
    kind: str,
    model: str,
    content: str,
    passage: Passage | None,
    turns: list[Turn],
    how: Settings,
) -> Request:
    user, context = str(shown.owner_id), passage.text if passage else None
    if kind == Generation.Kind.COMPLETION:
        return CompletionRequest(id=id, user=user, model=model, prompt=content, settings=how)
    if kind == Generation.Kind.QA:
        return QARequest(id=id, user=user, model=model, question=content, context=context, settings=how)
    system = [Turn(role="system", content=shown.system_prompt)] if shown.system_prompt else []
    return ChatRequest(id=id, user=user, model=model, messages=[*system, *turns], settings=how, context=context)


def history(messages: Sequence[Message]) -> list[Turn]:
    """Returns what the model is to know of a conversation that ends with a question.

    A question whose answer broke off by itself is left out with it: the model would answer that one first.
    """
    *before, question = messages
    turns = []
    for asked, answered in zip(before[::2], before[1::2], strict=True):
        if answered.generation.status in (Status.DONE, Status.STOPPED) and answered.content:
            turns += [Turn(role=m.role, content=m.content) for m in (asked, answered)]
    return [*turns, Turn(role="user", content=question.content)]


def search(user: Any, query: str, limit: int = LIST) -> list[dict[str, Any]]:
    """Returns the user's conversations that have every word, or its beginning, in their title or in one message.

    Each is a `conversation_json` with `message` (the newest match, None for the title) and an `excerpt` around it.
    """
    words = re.findall(r"\w+", query)
    if not words:
        return []
    if len(words) > WORDS:
        raise UserError(f"the search has {len(words)} words, expected at most {WORDS}")
    mine = Conversation.objects.filter(owner=user, deleted__isnull=True)
    folded = [_fold(word) for word in words]
    titles = mine.order_by("-updated").values_list("id", "title").iterator()  # SQLite folds the case of ASCII alone
    in_title = (id for id, title in titles if all(word in _fold(title) for word in folded))
    ids = list(islice(in_title, limit))
    hits = mine.in_bulk(ids)
    found: dict[UUID, dict[str, Any]] = {
        id: conversation_json(hits[id]) | {"message": None, "excerpt": hits[id].title} for id in ids
    }
    for hit in _matches(user, words).order_by("-created", "-id")[: 4 * limit]:
        there = found.get(hit.conversation_id)
        facts = {"message": str(hit.id), "excerpt": excerpt(hit.content, words)}
        if there is None and len(found) < limit:
            found[hit.conversation_id] = conversation_json(hit.conversation) | facts
        elif there is not None and there["message"] is None:
            there |= facts
    return list(found.values())


def _fold(text: str) -> str:
    """Returns the text as it is compared, whatever its case and however its letters are composed."""
    return unicodedata.normalize("NFKC", text).casefold()


def _matches(user: Any, words: Sequence[str]) -> QuerySet[Message]:
    """Returns the user's messages that have each word or a word that begins with it."""
    mine = Message.objects.filter(conversation__owner=user, conversation__deleted__isnull=True)
    mine = mine.select_related("conversation")
    if connection.vendor == "postgresql":
        query = SearchQuery(" & ".join(f"{word}:*" for word in words), config="simple", search_type="raw")
        return mine.annotate(words=SearchVector("content", config="simple")).filter(words=query)
    query = " ".join(f'"{word}"*' for word in words)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT r.message_id FROM chat_search s JOIN chat_search_row r ON r.row = s.rowid"
            " JOIN chat_message m ON m.id = r.message_id JOIN chat_conversation c ON c.id = m.conversation_id"
            " WHERE chat_search MATCH %s AND c.owner_id = %s AND c.deleted IS NULL ORDER BY r.row DESC LIMIT %s",
            [query, user.pk, 4 * LIST],
        )
        return mine.filter(id__in=[row[0] for row in cursor.fetchall()])


def excerpt(text: str, words: Sequence[str]) -> str:
    """Returns the part of a text around the first of the words."""
    at = min((m.start() for word in words if (m := re.search(re.escape(word), text, re.IGNORECASE))), default=0)
    begin, end = max(at - EXCERPT, 0), at + EXCERPT
    part = " ".join(text[begin:end].split())
    return ("…" if begin else "") + part + ("…" if end < len(text) else "")


def question_sets(user: Any) -> QuerySet[QuestionSet]:
    """Returns the user's question sets, the newest first."""
    return QuestionSet.objects.filter(owner=user).order_by("-created")


def question_set(user: Any, id: UUID) -> QuestionSet:
    """Returns the user's question set."""
    return QuestionSet.objects.get(owner=user, id=id)


def run(user: Any, id: UUID) -> Run:
    """Returns the user's run."""
    return Run.objects.select_related("set").get(set__owner=user, id=id)


def run_json(shown: Run) -> dict[str, Any]:
    """Returns a run with its mean scores so far, in percent."""
    scores = list(shown.answers.values_list("exact", "f1"))
    return {
        "id": str(shown.id),
        "set": str(shown.set_id),
        "model": shown.model,
        "with_context": shown.with_context,
        "status": shown.status,
        "error_message": shown.error_message,
        "weights": shown.weights,
        "created": shown.created.isoformat(),
        "answered": len(scores),
        "skipped": shown.answers.exclude(skipped="").count(),
        "questions": shown.set.questions.count(),
        "exact": 100 * sum(e for e, _ in scores) / len(scores) if scores else None,
        "f1": 100 * sum(f for _, f in scores) / len(scores) if scores else None,
    }


def set_json(shown: QuestionSet) -> dict[str, Any]:
    """Returns a question set with its runs."""
    return {
        "id": str(shown.id),
        "name": shown.name,
        "created": shown.created.isoformat(),
        "questions": shown.questions.count(),
        "runs": [run_json(each) for each in shown.runs.select_related("set").order_by("-id")],
    }


def predictions(of: Run) -> dict[str, str]:
    """Returns a run's answers by the ids of the questions, as the official script and `babl compare` read them."""
    return dict(of.answers.order_by("question__position").values_list("question__qid", "text"))


def unanswered(of: Run) -> list[Question]:
    """Returns the questions that a run has no answer to yet, with their passages."""
    answered = of.answers.values("question_id")
    return list(of.set.questions.exclude(id__in=answered).select_related("passage"))


def difference(user: Any, a: UUID, b: UUID) -> list[dict[str, Any]]:
    """Returns for each question that both runs answered what each answered and B's scores minus A's, in percent.

    Raises:
        Run.DoesNotExist: A run is another's, or of another set than the first.
    """
    first = run(user, a)
    second = Run.objects.get(set=first.set, id=b)
    theirs = {each.question_id: each for each in second.answers.all()}
    rows = []
    for mine in first.answers.select_related("question").order_by("question__position"):
        other = theirs.get(mine.question_id)
        if other is None:
            continue
        question = mine.question
        rows.append(
            {
                "qid": question.qid,
                "question": question.text,
                "passage": str(question.passage_id),
                "golds": [answer["text"] for answer in question.answers],
                "a": {"text": mine.text, "exact": 100 * mine.exact, "f1": 100 * mine.f1},
                "b": {"text": other.text, "exact": 100 * other.exact, "f1": 100 * other.f1},
                "exact": 100 * (other.exact - mine.exact),
                "f1": 100 * (other.f1 - mine.f1),
            }
        )
    return rows


def judged(user: Any | None = None) -> Iterable[Feedback]:
    """Returns what users (or one of them) said of answers about a passage, the oldest first."""
    found = Feedback.objects.filter(message__generation__with_context=True, message__parent__passage__isnull=False)
    if user is not None:
        found = found.filter(message__conversation__owner=user)
    related = ("message__generation", "message__parent__passage", "message__conversation")
    return found.select_related(*related).order_by("updated", "message_id")
