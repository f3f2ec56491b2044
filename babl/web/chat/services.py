"""Every write. Each function is one transaction and runs on the writer's thread (`database.write`)."""

import hashlib
import re
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal
from uuid import UUID

import msgspec
from django.conf import settings
from django.contrib.auth import get_user_model
from django.contrib.sessions.backends.db import SessionStore
from django.db import transaction
from django.db.models import Model
from django.utils import timezone

from babl.errors import UserError
from babl.web.chat import selectors
from babl.web.chat.models import (
    LIVE,
    ApiKey,
    Conversation,
    Feedback,
    Generation,
    Message,
    Passage,
    Question,
    QuestionSet,
    Run,
    RunAnswer,
    Status,
    uuid7,
)
from babl.web.engine.protocol import Request, Settings

TITLE = 60  # characters of a title made of what is asked or attached
COLUMNS = 8  # answers to one question at once
TRASH_DAYS = 30
LOCAL = "local"  # the user of a server without login


class Conflict(UserError):
    """What was asked for does not go with what has happened meanwhile."""


class ConversationUpdate(msgspec.Struct, forbid_unknown_fields=True):
    """What may be changed of a conversation; what is absent stays."""

    title: str | msgspec.UnsetType = msgspec.UNSET
    system_prompt: str | msgspec.UnsetType = msgspec.UNSET
    model: str | msgspec.UnsetType = msgspec.UNSET
    settings: Settings | msgspec.UnsetType = msgspec.UNSET
    passage: UUID | msgspec.UnsetType | None = msgspec.UNSET
    leaf: UUID | msgspec.UnsetType = msgspec.UNSET  # show the branch with this message
    archived: bool | msgspec.UnsetType = msgspec.UNSET
    deleted: bool | msgspec.UnsetType = msgspec.UNSET


class NewQuestion(msgspec.Struct, forbid_unknown_fields=True):
    """A question, and who is to answer it how: each model with each of `contexts`, side by side."""

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
    """Another answer to the question that has this answer; what is None is as it was."""

    client_id: UUID
    model: str | None = None
    with_context: bool | None = None
    settings: Settings | None = None


class NewFeedback(msgspec.Struct, forbid_unknown_fields=True):
    """What the user thinks of an answer; the right span counts code points of the passage."""

    good: bool
    span: tuple[int, int] | None = None
    no_answer: bool = False
    note: str = ""


@dataclass(frozen=True)
class Asked:
    """What a question has led to.

    Attributes:
        question: The user's message.
        answers: Placeholders, to be filled.
        requests: What the engine is to be asked, one for each new answer; none where all this was there already.
    """

    question: Message
    answers: list[Message]
    requests: list[Request]


def _text(name: str, value: str, most: int, least: int = 0) -> str:
    """Returns the text without NUL, which PostgreSQL cannot store, if it is neither too long nor too short."""
    value = value.replace("\0", "")
    if not least <= len(value) <= most:
        raise UserError(f"{name} has {len(value)} characters, expected {least} to {most}")
    return value


def without_nul(data: bytes) -> bytes:
    """Returns JSON without the escape of NUL, which PostgreSQL cannot store; an escaped backslash is none of it."""
    return re.sub(rb"(?<!\\)((?:\\\\)*)\\u0000", rb"\1", data)


def _touch(conversation: Conversation, *fields: str) -> None:
    conversation.updated = timezone.now()
    conversation.save(update_fields=[*fields, "updated"])


@transaction.atomic
def create_conversation(user: Any, id: UUID | None = None, update: ConversationUpdate | None = None) -> Conversation:
    """Returns the new conversation, or the user's one of that id where it is there already.

    Raises:
        Conflict: Another user has one of that id.
    """
    if id is not None and (there := Conversation.objects.filter(id=id).first()):
        if there.owner_id != user.pk:
            raise Conflict("that id is taken")
        return there
    conversation = Conversation.objects.create(id=id or uuid7(), owner=user)
    return update_conversation(user, conversation.id, update) if update else conversation


@transaction.atomic
def update_conversation(user: Any, id: UUID, update: ConversationUpdate) -> Conversation:
    """Returns the conversation as it is now.

    Raises:
        Conversation.DoesNotExist, Passage.DoesNotExist, Message.DoesNotExist: The user has none of that id.
        UserError: A text is too long.
    """
    conversation = selectors.conversation(user, id)
    given = {name: value for name in update.__struct_fields__ if (value := getattr(update, name)) is not msgspec.UNSET}
    for name, most in (("title", 200), ("system_prompt", settings.PROMPT_CHARACTERS), ("model", 200)):
        if name in given:
            setattr(conversation, name, _text(name, given[name], most))
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
    if not given.keys() <= {"leaf", "archived", "deleted"}:  # looking and tidying do not make it newer
        conversation.updated = now
    conversation.save()
    return conversation


@transaction.atomic
def purge_conversation(user: Any, id: UUID) -> list[str]:
    """Returns the ids of answers that were being written; the conversation is gone, with passages only it has used.

    Raises:
        Conflict: It is not in the trash.
    """
    conversation = selectors.conversation(user, id)
    if conversation.deleted is None:
        raise Conflict("the conversation is not in the trash")
    live = Generation.objects.filter(message__conversation=conversation, status__in=LIVE)
    ids = [str(id) for id in live.values_list("message_id", flat=True)]
    _purge([conversation])
    return ids


@transaction.atomic
def tidy() -> None:
    """What was in the trash for `TRASH_DAYS`, and sessions that have expired, are gone for good."""
    _purge(list(Conversation.objects.filter(deleted__lt=timezone.now() - timedelta(days=TRASH_DAYS))))
    SessionStore.clear_expired()


def _purge(conversations: Sequence[Conversation]) -> None:
    used = set(Message.objects.filter(conversation__in=conversations).values_list("passage_id", flat=True))
    used |= {each.passage_id for each in conversations}
    for each in conversations:
        each.delete()
    delete_unused(used - {None})


def delete_unused(passages: Collection[UUID]) -> None:
    """Those of the passages that nothing uses are gone."""
    free = Passage.objects.filter(id__in=passages, questions__isnull=True)
    free = free.exclude(id__in=Question.objects.values("passage_id"))
    free.exclude(id__in=Conversation.objects.filter(passage__isnull=False).values("passage_id")).delete()


def passage_text(text: str) -> str:
    """Returns the text as it is stored.

    Raises:
        UserError: It is empty or too long.
    """
    return _text("the passage", text.replace("\r\n", "\n"), settings.PASSAGE_CHARACTERS, least=1)


@transaction.atomic
def add_passage(user: Any, text: str, title: str = "", **facts: Any) -> Passage:
    """Returns the user's passage of this text: the one that is there already, or a new one with these facts."""
    text = passage_text(text)
    title = _text("title", title, 200) or _title(text)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    facts |= {"text": text, "title": title}
    return Passage.objects.get_or_create(owner=user, sha256=sha256, defaults=facts)[0]


@transaction.atomic
def delete_passage(user: Any, id: UUID) -> None:
    """The passage is gone.

    Raises:
        Conflict: A conversation or a question set is about it.
    """
    passage = selectors.passage(user, id)
    delete_unused([passage.id])
    if Passage.objects.filter(id=passage.id).exists():
        raise Conflict("a conversation or a question set is about the passage; delete that first")


@transaction.atomic
def ask(user: Any, id: UUID, body: NewQuestion) -> Asked:
    """Returns the question and its waiting answers, all of them stored; asked twice, it is stored once.

    Raises:
        Conversation.DoesNotExist, Passage.DoesNotExist: The user has none of that id.
        Conflict: The parent is no answer of this conversation, or one that is still being written; or the conversation
            is in the trash.
        UserError: A text is too long, or there are too many answers to write.
    """
    conversation = selectors.conversation(user, id)
    there = conversation.messages.select_related("passage").filter(client_id=body.client_id).first()
    if there is not None:
        return Asked(there, list(there.children.select_related("generation").order_by("created", "id")), [])
    _not_in_trash(conversation)
    if body.parent is not None:
        parent = conversation.messages.filter(id=body.parent, role=Message.Role.ASSISTANT)
        parent = parent.select_related("generation").first()
        if parent is None:
            raise Conflict("the answer this question follows is not in the conversation")
        if parent.generation.status in LIVE:
            raise Conflict("the answer before is still being written")
    ways = [(model, context) for model in dict.fromkeys(body.models) for context in dict.fromkeys(body.contexts)]
    if not 1 <= len(ways) <= COLUMNS:
        raise UserError(f"{len(ways)} answers were asked for, expected 1 to {COLUMNS}")
    passage = None if body.passage is None else selectors.passage(user, body.passage)
    question = Message.objects.create(
        conversation=conversation,
        parent_id=body.parent,
        role=Message.Role.USER,
        content=_text("the question", body.content, settings.PROMPT_CHARACTERS, least=1),
        client_id=body.client_id,
        passage=passage,
        golds=None if body.golds is None else [gold for gold in body.golds if gold.strip()],
    )
    kind = body.kind or (Generation.Kind.QA if passage or len(ways) > 1 else Generation.Kind.CHAT)
    sampling = conversation.settings if body.settings is None else msgspec.to_builtins(body.settings)
    answers = []
    for model, context in ways:
        answer = Message(conversation=conversation, parent=question, role=Message.Role.ASSISTANT)
        how = Generation(kind=kind, model=_text("model", model, 200, least=1), with_context=context, settings=sampling)
        how.comparison = question.id if len(ways) > 1 else None
        answers.append(_placed(answer, how))
    conversation.leaf, conversation.model = answers[0], ways[0][0]
    conversation.title = conversation.title or _title(question.content)
    _touch(conversation, "leaf", "model", "title")
    return Asked(question, answers, [selectors.request(answer.generation) for answer in answers])


def _not_in_trash(conversation: Conversation) -> None:
    """Nothing is written where nobody finds it, and where it is purged in the end."""
    if conversation.deleted is not None:
        raise Conflict("the conversation is in the trash; take it back first")


def _title(text: str) -> str:
    """Returns the first line, or as many words of it as there is room for."""
    line = " ".join(text.strip().split("\n", 1)[0].split())
    return line if len(line) <= TITLE else line[: TITLE - 1].rsplit(" ", 1)[0] + "…"


def _placed(answer: Message, how: Generation) -> Message:
    answer.save(force_insert=True)
    how.message = answer
    how.save(force_insert=True)
    return answer


@transaction.atomic
def ask_again(user: Any, id: UUID, body: AskAgain) -> Asked:
    """Returns the question of this answer with a further one waiting beside it; asked twice, it is stored once.

    Where the answer stands side by side with others, all of them are asked again, each its model.

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
    _not_in_trash(conversation)
    columns = [each.generation for each in _beside(before)]
    if any(each.status in LIVE for each in columns):
        raise Conflict("the answer is still being written")
    alone = len(columns) == 1
    answers: list[Message] = []
    for i, column in enumerate(columns):
        answer = Message(conversation=conversation, parent=question, role=Message.Role.ASSISTANT)
        answer.client_id = None if i else body.client_id
        how = Generation(
            kind=column.kind,
            model=_text("model", (alone and body.model) or column.model, 200, least=1),
            with_context=column.with_context if body.with_context is None or not alone else body.with_context,
            settings=column.settings if body.settings is None else msgspec.to_builtins(body.settings),
            comparison=None if alone else (answers[0] if answers else answer).id,
        )
        answers.append(_placed(answer, how))
    conversation.leaf = answers[0]
    _touch(conversation, "leaf")
    return Asked(question, answers, [selectors.request(answer.generation) for answer in answers])


def _beside(answer: Message) -> list[Message]:
    """Returns the answers that stand side by side with this one, itself among them."""
    comparison = answer.generation.comparison
    if comparison is None:
        return [answer]
    there = answer.conversation.messages.filter(generation__comparison=comparison)
    return list(there.select_related("generation").order_by("created", "id"))


@transaction.atomic
def save_progress(rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
    """What has been written so far of the answers is stored: id, text, and facts of `Generation`.

    An answer that has ended meanwhile stays as it is.
    """
    for id, text, facts in rows:
        if Generation.objects.filter(message_id=id, status__in=LIVE).update(**facts):
            Message.objects.filter(id=id).update(content=text.replace("\0", ""))


@transaction.atomic
def finish(id: str, text: str, facts: Mapping[str, Any]) -> None:
    """The answer is stored as it ended; the first call counts."""
    if Generation.objects.filter(message_id=id, status__in=LIVE).update(finished=timezone.now(), **facts):
        Message.objects.filter(id=id).update(content=text.replace("\0", ""))


@transaction.atomic
def interrupt_all() -> int:
    """Returns how many answers and runs nobody works on any more; they are now marked interrupted, with what they have.

    Called where nothing is running: at the start, and at the end.
    """
    answers = Generation.objects.filter(status__in=LIVE)
    count = answers.update(status=Status.INTERRUPTED, finished=timezone.now())
    return count + Run.objects.filter(status__in=LIVE).update(status=Status.INTERRUPTED)


@transaction.atomic
def give_feedback(user: Any, id: UUID, body: NewFeedback) -> Feedback:
    """Returns what the user now thinks of the answer.

    Raises:
        Message.DoesNotExist: The user has no such answer.
        UserError: The span is not in the passage, or stands beside `no_answer`.
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
    facts |= {"note": _text("note", body.note, 10_000), "updated": timezone.now()}
    return Feedback.objects.update_or_create(message=answer, defaults=facts)[0]


@transaction.atomic
def delete_feedback(user: Any, id: UUID) -> None:
    """The answer has no feedback."""
    Feedback.objects.filter(message=selectors.message(user, id)).delete()


@transaction.atomic
def create_api_key(user: Any, name: str) -> tuple[ApiKey, str]:
    """Returns the new key's row, and the key itself, which is nowhere else."""
    key = f"babl-{secrets.token_urlsafe(32)}"
    row = ApiKey.objects.create(
        owner=user, name=_text("name", name, 100, least=1), prefix=key[:12], sha256=key_hash(key)
    )
    return row, key


def key_hash(key: str) -> str:
    """Returns what is stored of an API key; it is random and long, so a plain hash keeps it."""
    return hashlib.sha256(key.encode()).hexdigest()


@transaction.atomic
def revoke_api_key(user: Any, id: UUID) -> None:
    """The key lets nobody in any more."""
    key = ApiKey.objects.get(owner=user, id=id)
    key.revoked = key.revoked or timezone.now()
    key.save(update_fields=["revoked"])


@transaction.atomic
def give_password(name: str, password: str) -> None:
    """The user, a new one or not, logs in with this password; keys of before let nobody in any more."""
    user, _ = get_user_model().objects.get_or_create(username=name)
    user.set_password(password)  # which ends the sessions of before
    user.save()
    selectors.api_keys(user).update(revoked=timezone.now())


@transaction.atomic
def remove_user(name: str) -> int:
    """Returns how many conversations are gone with the user, and all else that was theirs.

    Raises:
        UserError: There is no such user.
    """
    user = get_user_model().objects.filter(username=name).first()
    if user is None:
        raise UserError(f"there is no user {name!r}")
    conversations = list(Conversation.objects.filter(owner=user))
    _purge(conversations)  # messages and questions keep the passages that they are about
    QuestionSet.objects.filter(owner=user).delete()
    user.delete()
    return len(conversations)


@transaction.atomic
def local_user() -> Model:
    """Returns the one user of a server without login."""
    user, new = get_user_model().objects.get_or_create(username=LOCAL)
    if new:
        user.set_unusable_password()
        user.save()
    return user


@transaction.atomic
def create_run(user: Any, set_id: UUID, model: str, with_context: bool) -> Run:
    """Returns a new run of the user's question set, waiting."""
    of = selectors.question_set(user, set_id)
    return Run.objects.create(set=of, model=_text("model", model, 200, least=1), with_context=with_context)


@transaction.atomic
def resume_run(user: Any, id: UUID) -> Run:
    """Returns the run, waiting again for the answers it has not.

    Raises:
        Conflict: It is going on, or done.
    """
    run = selectors.run(user, id)
    if run.status in (*LIVE, Status.DONE):
        raise Conflict(f"the run is {run.status}")
    run.status, run.error_message = Status.QUEUED, ""
    run.save(update_fields=["status", "error_message"])
    return run


@transaction.atomic
def change_run(id: UUID, status: str, answers: Iterable[RunAnswer] = (), **facts: Any) -> None:
    """The run has this status and these answers more."""
    RunAnswer.objects.bulk_create(answers, ignore_conflicts=True)
    Run.objects.filter(id=id).update(status=status, **facts)


@transaction.atomic
def stop_run(id: UUID) -> None:
    """The run is stopped, unless it has ended."""
    Run.objects.filter(id=id, status__in=LIVE).update(status=Status.STOPPED)


@transaction.atomic
def delete_question_set(user: Any, id: UUID) -> None:
    """The set and its runs are gone, and the passages that nothing else uses."""
    gone = selectors.question_set(user, id)
    passages = set(gone.questions.values_list("passage_id", flat=True))
    gone.delete()
    delete_unused(passages)
