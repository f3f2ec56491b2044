"""Every read of the database. Each takes the user first and finds nothing of other users: their ids are not found."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import chain
from typing import Any
from uuid import UUID

from django.db import connection
from django.db.models import Q, QuerySet

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
)
from babl.web.chat.render import render
from babl.web.chat.serializers import message_json

MESSAGES_PER_PAGE = 40
CONVERSATIONS_PER_PAGE = 50


def conversations(
    user: Any, kind: str = "active", before: tuple[datetime, UUID] | None = None, limit: int = CONVERSATIONS_PER_PAGE
) -> list[Conversation]:
    """Returns a page of the user's conversations, the latest changed first.

    Args:
        user: Owner.
        kind: "active", "archived" or "trash".
        before: `updated` and id of the last conversation of the page before.
        limit: Length of the page.
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
        Conversation.DoesNotExist: There is none with this id, or it is another user's.
    """
    return Conversation.objects.select_related("passage").get(owner=user, id=id)


def message(user: Any, id: UUID) -> Message:
    """Returns the user's message with its conversation, generation and question."""
    return Message.objects.select_related("conversation", "generation", "parent__passage").get(
        conversation__owner=user, id=id
    )


def generation(user: Any, id: UUID) -> Generation:
    """Returns the generation of the user's answer with this id."""
    return Generation.objects.select_related("message__conversation", "message__parent").get(
        message__conversation__owner=user, message_id=id
    )


def passage(user: Any, id: UUID) -> Passage:
    """Returns the user's passage."""
    return Passage.objects.get(owner=user, id=id)


def passages(user: Any) -> QuerySet[Passage]:
    """Returns the user's passages, newest first, without their text; those that only question sets use are left out."""
    of_sets = Question.objects.filter(set__owner=user).values("passage_id")
    asked = Message.objects.filter(conversation__owner=user, passage__isnull=False).values("passage_id")
    attached = Conversation.objects.filter(owner=user, passage__isnull=False).values("passage_id")
    alone = Q(id__in=of_sets) & ~Q(id__in=asked) & ~Q(id__in=attached)
    return Passage.objects.filter(owner=user).exclude(alone).defer("text").order_by("-created")


def api_keys(user: Any) -> QuerySet[ApiKey]:
    """Returns the user's keys that are not revoked, newest first."""
    return ApiKey.objects.filter(owner=user, revoked__isnull=True).order_by("-created")


def path(leaf: UUID | None, limit: int | None = None) -> list[Message]:
    """Returns the messages from the root to this one, or the last `limit` of them.

    The caller has checked their owner.
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
    """Returns the end of the newest branch below this message."""
    id = message.id
    while (
        child := Message.objects.filter(parent_id=id).order_by("-created", "-id").values_list("id", flat=True).first()
    ):
        id = child
    return id


def thread(user: Any, id: UUID, before: UUID | None = None, limit: int = MESSAGES_PER_PAGE) -> dict[str, Any]:
    """Returns a page of the branch that is shown: {messages: [message_json], more: whether there are any above}.

    Args:
        user: Owner.
        id: Of the conversation.
        before: The topmost message so far; None for the last page.
        limit: Length of the page.

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
    """Returns the ids of the branches at this message, itself included; answers side by side are one branch."""
    found: dict[UUID, UUID] = {}
    for id, comparison in all_of_them:
        place = comparison or id
        found[place] = m.id if id == m.id else found.get(place, id)
    return [str(id) for id in found.values()]


def question_sets(user: Any) -> QuerySet[QuestionSet]:
    """Returns the user's question sets, newest first."""
    return QuestionSet.objects.filter(owner=user).order_by("-created")


def question_set(user: Any, id: UUID) -> QuestionSet:
    """Returns the user's question set."""
    return QuestionSet.objects.get(owner=user, id=id)


def run(user: Any, id: UUID) -> Run:
    """Returns the user's run."""
    return Run.objects.select_related("set").get(set__owner=user, id=id)


def predictions(of: Run) -> dict[str, str]:
    """Returns a run's answers by question id, as the official script and `babl compare` read them."""
    return dict(of.answers.order_by("question__position").values_list("question__qid", "text"))


def unanswered(of: Run) -> list[Question]:
    """Returns the questions that a run has not answered yet, with their passages."""
    answered = of.answers.values("question_id")
    return list(of.set.questions.exclude(id__in=answered).select_related("passage"))


def difference(user: Any, a: UUID, b: UUID) -> list[dict[str, Any]]:
    """Returns, for each question that both runs answered, both answers and B's scores minus A's, in percent.

    Raises:
        Run.DoesNotExist: A run is another user's, or of another set than the first.
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
    """Returns feedback on answers about a passage, of one user or of all, oldest first."""
    found = Feedback.objects.filter(message__generation__with_context=True, message__parent__passage__isnull=False)
    if user is not None:
        found = found.filter(message__conversation__owner=user)
    related = ("message__generation", "message__parent__passage", "message__conversation")
    return found.select_related(*related).order_by("updated", "message_id")
