"""Conversations, passages, messages and feedback: every write.

Each function is one transaction and runs on the writer's thread (`database.write`).
"""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal
from uuid import UUID

import msgspec
from django.conf import settings
from django.contrib.sessions.backends.db import SessionStore
from django.db import transaction
from django.utils import timezone

from babl.errors import UserError
from babl.web.chat import selectors
from babl.web.chat.engine_requests import answer_request
from babl.web.chat.models import (
    LIVE,
    Conversation,
    Feedback,
    Generation,
    Message,
    Passage,
    Question,
    Run,
    Status,
    uuid7,
)
from babl.web.engine.protocol import Request, Settings

TITLE_CHARACTERS = 60  # of a title made from the question or the passage
MAX_COLUMNS = 8  # answers to one question, side by side
TRASH_DAYS = 30


class Conflict(UserError):
    """The request conflicts with the current state."""


class ConversationUpdate(msgspec.Struct, forbid_unknown_fields=True):
    """What to change of a conversation; absent fields stay as they are."""

    title: str | msgspec.UnsetType = msgspec.UNSET
    system_prompt: str | msgspec.UnsetType = msgspec.UNSET
    model: str | msgspec.UnsetType = msgspec.UNSET
    settings: Settings | msgspec.UnsetType = msgspec.UNSET
    passage: UUID | msgspec.UnsetType | None = msgspec.UNSET
    leaf: UUID | msgspec.UnsetType = msgspec.UNSET  # show the branch with this message
    archived: bool | msgspec.UnsetType = msgspec.UNSET
    deleted: bool | msgspec.UnsetType = msgspec.UNSET


class NewQuestion(msgspec.Struct, forbid_unknown_fields=True):
    """A question to ask: of each model with each of `contexts` (with and without the passage), side by side."""

    client_id: UUID
    content: str
    models: list[str]
    parent: UUID | None = None
    passage: UUID | None = None
    contexts: tuple[bool, ...] = (True,)
    kind: Literal["chat", "qa", "completion"] | None = None
    golds: list[str] | None = None
    settings: Settings | None = None


class AskAgain(msgspec.Struct, forbid_unknown_fields=True):
    """Asks for another answer to the same question; None keeps what the first answer had."""

    client_id: UUID
    model: str | None = None
    with_context: bool | None = None
    settings: Settings | None = None


class NewFeedback(msgspec.Struct, forbid_unknown_fields=True):
    """Feedback on an answer; `span` is the right answer, in code points of the passage."""

    good: bool
    span: tuple[int, int] | None = None
    no_answer: bool = False
    note: str = ""


@dataclass(frozen=True)
class Asked:
    """A question that is stored, and its answers.

    Attributes:
        question: The user's message.
        answers: Still empty, if they are new.
        requests: To send to the engine, one for each new answer; none if the question was there already.
    """

    question: Message
    answers: list[Message]
    requests: list[Request]


def checked_text(name: str, value: str, most: int, least: int = 0) -> str:
    """Returns the text without NUL, which PostgreSQL cannot store.

    Raises:
        UserError: It is too long or too short.
    """
    value = value.replace("\0", "")
    if not least <= len(value) <= most:
        raise UserError(f"{name} has {len(value)} characters, expected {least} to {most}")
    return value


def without_nul(data: bytes) -> bytes:
    """Returns JSON without escaped NULs, which PostgreSQL cannot store; an escaped backslash before u0000 stays."""
    return re.sub(rb"(?<!\\)((?:\\\\)*)\\u0000", rb"\1", data)


def _touch(conversation: Conversation, *fields: str) -> None:
    conversation.updated = timezone.now()
    conversation.save(update_fields=[*fields, "updated"])


@transaction.atomic
def create_conversation(user: Any, id: UUID | None = None, update: ConversationUpdate | None = None) -> Conversation:
    """Creates a conversation; returns the existing one if the user has one with this id.

    Raises:
        Conflict: Another user has one with this id.
    """
    if id is not None and (there := Conversation.objects.filter(id=id).first()):
        if there.owner_id != user.pk:
            raise Conflict("that id is taken")
        return there
    conversation = Conversation.objects.create(id=id or uuid7(), owner=user)
    return update_conversation(user, conversation.id, update) if update else conversation


@transaction.atomic
def update_conversation(user: Any, id: UUID, update: ConversationUpdate) -> Conversation:
    """Changes a conversation and returns it.

    Raises:
        Conversation.DoesNotExist, Passage.DoesNotExist, Message.DoesNotExist: The user has none with this id.
        UserError: A text is too long.
    """
    conversation = selectors.conversation(user, id)
    given = {name: value for name in update.__struct_fields__ if (value := getattr(update, name)) is not msgspec.UNSET}
    for name, most in (("title", 200), ("system_prompt", settings.PROMPT_CHARACTERS), ("model", 200)):
        if name in given:
            setattr(conversation, name, checked_text(name, given[name], most))
    if "settings" in given:
        conversation.settings = msgspec.to_builtins(given["settings"])
    if "passage" in given:
        conversation.passage = None if given["passage"] is None else selectors.passage(user, given["passage"])
    if "leaf" in given:
        shown = Message.objects.get(conversation=conversation, id=given["leaf"])
        conversation.leaf_id = selectors.newest_leaf(shown)
    now = timezone.now()
    for name in ("archived", "deleted"):
        if name in given:
            setattr(conversation, name, now if given[name] else None)
    if not given.keys() <= {"leaf", "archived", "deleted"}:  # showing, archiving and trashing do not make it newer
        conversation.updated = now
    conversation.save()
    return conversation


@transaction.atomic
def purge_conversation(user: Any, id: UUID) -> list[str]:
    """Deletes a conversation and the passages that only it used; returns the ids of answers that were being written.

    Raises:
        Conflict: It is not in the trash.
    """
    conversation = selectors.conversation(user, id)
    if conversation.deleted is None:
        raise Conflict("the conversation is not in the trash")
    live = Generation.objects.filter(message__conversation=conversation, status__in=LIVE)
    ids = [str(id) for id in live.values_list("message_id", flat=True)]
    purge([conversation])
    return ids


@transaction.atomic
def tidy() -> None:
    """Deletes conversations that were in the trash for `TRASH_DAYS`, and sessions that have expired."""
    purge(list(Conversation.objects.filter(deleted__lt=timezone.now() - timedelta(days=TRASH_DAYS))))
    SessionStore.clear_expired()


def purge(conversations: Sequence[Conversation]) -> None:
    """Deletes conversations and the passages that only they used."""
    used = set(Message.objects.filter(conversation__in=conversations).values_list("passage_id", flat=True))
    used |= {each.passage_id for each in conversations}
    for each in conversations:
        each.delete()
    delete_unused(used - {None})


def delete_unused(passages: Collection[UUID]) -> None:
    """Deletes those of the passages that nothing uses."""
    free = Passage.objects.filter(id__in=passages, questions__isnull=True)
    free = free.exclude(id__in=Question.objects.values("passage_id"))
    free.exclude(id__in=Conversation.objects.filter(passage__isnull=False).values("passage_id")).delete()


def passage_text(text: str) -> str:
    """Returns a passage's text as it is stored.

    Raises:
        UserError: It is empty or too long.
    """
    return checked_text("the passage", text.replace("\r\n", "\n"), settings.PASSAGE_CHARACTERS, least=1)


@transaction.atomic
def add_passage(user: Any, text: str, title: str = "", **columns: Any) -> Passage:
    """Stores a passage with these columns; returns the existing one if the user has one with the same text."""
    text = passage_text(text)
    title = checked_text("title", title, 200) or _title(text)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    columns |= {"text": text, "title": title}
    return Passage.objects.get_or_create(owner=user, sha256=sha256, defaults=columns)[0]


@transaction.atomic
def delete_passage(user: Any, id: UUID) -> None:
    """Deletes a passage.

    Raises:
        Conflict: A conversation or a question set is about it.
    """
    passage = selectors.passage(user, id)
    delete_unused([passage.id])
    if Passage.objects.filter(id=passage.id).exists():
        raise Conflict("a conversation or a question set is about the passage; delete that first")


@transaction.atomic
def ask(user: Any, id: UUID, body: NewQuestion) -> Asked:
    """Stores a question and its answers, still empty; asked twice, it is stored once.

    Raises:
        Conversation.DoesNotExist, Passage.DoesNotExist: The user has none with this id.
        Conflict: The parent is not an answer of this conversation, or is still being written; or the conversation is in
            the trash.
        UserError: A text is too long, or there are too many answers to write.
    """
    conversation = selectors.conversation(user, id)
    there = conversation.messages.select_related("passage").filter(client_id=body.client_id).first()
    if there is not None:
        return Asked(there, list(there.children.select_related("generation").order_by("created", "id")), [])
    _check_not_in_trash(conversation)
    if body.parent is not None:
        parent = conversation.messages.filter(id=body.parent, role=Message.Role.ASSISTANT)
        parent = parent.select_related("generation").first()
        if parent is None:
            raise Conflict("the answer this question follows is not in the conversation")
        if parent.generation.status in LIVE:
            raise Conflict("the previous answer is still being written")
    variants = [(model, context) for model in dict.fromkeys(body.models) for context in dict.fromkeys(body.contexts)]
    if not 1 <= len(variants) <= MAX_COLUMNS:
        raise UserError(f"{len(variants)} answers were asked for, expected 1 to {MAX_COLUMNS}")
    passage = None if body.passage is None else selectors.passage(user, body.passage)
    question = Message.objects.create(
        conversation=conversation,
        parent_id=body.parent,
        role=Message.Role.USER,
        content=checked_text("the question", body.content, settings.PROMPT_CHARACTERS, least=1),
        client_id=body.client_id,
        passage=passage,
        golds=None if body.golds is None else [gold for gold in body.golds if gold.strip()],
    )
    kind = body.kind or (Generation.Kind.QA if passage or len(variants) > 1 else Generation.Kind.CHAT)
    sampling = conversation.settings if body.settings is None else msgspec.to_builtins(body.settings)
    answers = []
    for model, context in variants:
        answer = Message(conversation=conversation, parent=question, role=Message.Role.ASSISTANT)
        generation = Generation(
            kind=kind, model=checked_text("model", model, 200, least=1), with_context=context, settings=sampling
        )
        generation.comparison = question.id if len(variants) > 1 else None
        answers.append(_create_answer(answer, generation))
    conversation.leaf, conversation.model = answers[0], variants[0][0]
    conversation.title = conversation.title or _title(question.content)
    _touch(conversation, "leaf", "model", "title")
    return Asked(question, answers, [answer_request(answer.generation) for answer in answers])


def _check_not_in_trash(conversation: Conversation) -> None:
    """Raises a Conflict if the conversation is in the trash, where nobody would find the answer."""
    if conversation.deleted is not None:
        raise Conflict("the conversation is in the trash; restore it first")


def _title(text: str) -> str:
    """Returns a title: the first line, or as many words of it as fit."""
    line = " ".join(text.strip().split("\n", 1)[0].split())
    return line if len(line) <= TITLE_CHARACTERS else line[: TITLE_CHARACTERS - 1].rsplit(" ", 1)[0] + "…"


def _create_answer(answer: Message, generation: Generation) -> Message:
    answer.save(force_insert=True)
    generation.message = answer
    generation.save(force_insert=True)
    return answer


@transaction.atomic
def ask_again(user: Any, id: UUID, body: AskAgain) -> Asked:
    """Stores another answer, still empty, to the question of this one; asked twice, it is stored once.

    If the answer stands side by side with others, all of them are asked again, each of its own model.

    Raises:
        Message.DoesNotExist: The user has no such answer.
        Conflict: One of those answers is still being written, or the conversation is in the trash.
    """
    before = selectors.message(user, id)
    if before.role != Message.Role.ASSISTANT:
        raise Message.DoesNotExist
    conversation, question = before.conversation, before.parent
    there = conversation.messages.select_related("generation").filter(client_id=body.client_id).first()
    if there is not None:
        return Asked(question, _beside(there), [])
    _check_not_in_trash(conversation)
    columns = [each.generation for each in _beside(before)]
    if any(each.status in LIVE for each in columns):
        raise Conflict("the answer is still being written")
    alone = len(columns) == 1
    answers: list[Message] = []
    for i, column in enumerate(columns):
        answer = Message(conversation=conversation, parent=question, role=Message.Role.ASSISTANT)
        answer.client_id = None if i else body.client_id
        generation = Generation(
            kind=column.kind,
            model=checked_text("model", (alone and body.model) or column.model, 200, least=1),
            with_context=column.with_context if body.with_context is None or not alone else body.with_context,
            settings=column.settings if body.settings is None else msgspec.to_builtins(body.settings),
            comparison=None if alone else (answers[0] if answers else answer).id,
        )
        answers.append(_create_answer(answer, generation))
    conversation.leaf = answers[0]
    _touch(conversation, "leaf")
    return Asked(question, answers, [answer_request(answer.generation) for answer in answers])


def _beside(answer: Message) -> list[Message]:
    """Returns the answers side by side with this one, itself included."""
    comparison = answer.generation.comparison
    if comparison is None:
        return [answer]
    there = answer.conversation.messages.filter(generation__comparison=comparison)
    return list(there.select_related("generation").order_by("created", "id"))


@transaction.atomic
def save_progress(rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
    """Stores what has been written so far of answers that have not ended: id, text, and columns of `Generation`."""
    for id, text, columns in rows:
        if Generation.objects.filter(message_id=id, status__in=LIVE).update(**columns):
            Message.objects.filter(id=id).update(content=text.replace("\0", ""))


@transaction.atomic
def finish(id: str, text: str, columns: Mapping[str, Any]) -> None:
    """Stores an answer as it ended; later calls change nothing."""
    if Generation.objects.filter(message_id=id, status__in=LIVE).update(finished=timezone.now(), **columns):
        Message.objects.filter(id=id).update(content=text.replace("\0", ""))


@transaction.atomic
def interrupt_all() -> int:
    """Marks unfinished answers and runs as interrupted; returns how many there were.

    Called while nothing is running: at the start, and at the end.
    """
    answers = Generation.objects.filter(status__in=LIVE)
    count = answers.update(status=Status.INTERRUPTED, finished=timezone.now())
    return count + Run.objects.filter(status__in=LIVE).update(status=Status.INTERRUPTED)


@transaction.atomic
def give_feedback(user: Any, id: UUID, body: NewFeedback) -> Feedback:
    """Stores the user's feedback on an answer, in place of any before.

    Raises:
        Message.DoesNotExist: The user has no such answer.
        Conflict: The answer is still being written.
        UserError: The span is not in the passage, or `no_answer` is given with it.
    """
    answer = selectors.message(user, id)
    if answer.role != Message.Role.ASSISTANT:
        raise Message.DoesNotExist
    if answer.generation.status in LIVE:
        raise Conflict("the answer is still being written")
    passage = answer.parent.passage
    if (body.span or body.no_answer) and passage is None:
        raise UserError("the question has no passage to find an answer in")
    if body.span and body.no_answer:
        raise UserError("a right span and no_answer exclude each other")
    if body.span and not 0 <= body.span[0] < body.span[1] <= len(passage.text):
        raise UserError(
            f"the span is {list(body.span)}, expected a part of the passage's {len(passage.text)} characters"
        )
    start, end = body.span or (None, None)
    facts: dict[str, Any] = {"good": body.good, "right_start": start, "right_end": end, "no_answer": body.no_answer}
    facts |= {"note": checked_text("note", body.note, 10_000), "updated": timezone.now()}
    return Feedback.objects.update_or_create(message=answer, defaults=facts)[0]


@transaction.atomic
def delete_feedback(user: Any, id: UUID) -> None:
    """Deletes the user's feedback on an answer."""
    Feedback.objects.filter(message=selectors.message(user, id)).delete()
