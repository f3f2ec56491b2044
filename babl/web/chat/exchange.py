"""Conversations out and in again: a JSON file with everything, or Markdown to be read.

A file names everything by its id, so importing it twice changes nothing. An id that another user has here stands, for
this user, for another one made of both; so nobody sees or changes what is another's.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from datetime import datetime
from typing import Any, Literal
from uuid import UUID, uuid5

import msgspec
from django.db import transaction

from babl.errors import UserError
from babl.web.chat import selectors, services
from babl.web.chat.models import LIVE, Conversation, Feedback, Generation, Message, Passage, Status

FORMAT, VERSION = "babl-conversations", 1


class PassageRow(msgspec.Struct):
    """A passage in a file."""

    id: UUID
    title: str
    text: str
    created: datetime


class GenerationRow(msgspec.Struct):
    """How an answer came about, in a file."""

    kind: Literal["chat", "qa", "completion"]
    model: str
    status: Literal["done", "stopped", "interrupted", "error"]
    with_context: bool = True
    comparison: UUID | None = None
    settings: dict[str, Any] = {}
    finish: str = ""
    error: str = ""
    error_message: str = ""
    prompt_tokens: int | None = None
    cut_tokens: int | None = None
    windows: int | None = None
    tokens: int | None = None
    log_prob: float | None = None
    probability: float | None = None
    span_start: int | None = None
    span_end: int | None = None
    first_seconds: float | None = None
    seconds: float | None = None
    weights: str = ""
    tokenizer: str = ""
    finished: datetime | None = None


class FeedbackRow(msgspec.Struct):
    """What the user thought of an answer, in a file."""

    good: bool
    updated: datetime
    right_start: int | None = None
    right_end: int | None = None
    no_answer: bool = False
    note: str = ""


class MessageRow(msgspec.Struct):
    """A message in a file; its parent stands before it."""

    id: UUID
    role: Literal["user", "assistant"]
    content: str
    created: datetime
    parent: UUID | None = None
    client_id: UUID | None = None
    passage: UUID | None = None
    golds: list[str] | None = None
    generation: GenerationRow | None = None
    feedback: FeedbackRow | None = None


class ConversationRow(msgspec.Struct):
    """A conversation in a file."""

    id: UUID
    title: str
    created: datetime
    updated: datetime
    messages: list[MessageRow]
    system_prompt: str = ""
    model: str = ""
    settings: dict[str, Any] = {}
    passage: UUID | None = None
    leaf: UUID | None = None
    archived: datetime | None = None
    deleted: datetime | None = None


class File(msgspec.Struct):
    """All of a file."""

    format: Literal["babl-conversations"]
    version: Literal[1]
    passages: list[PassageRow]
    conversations: list[ConversationRow]


def _columns(row: Any, kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in kind.__struct_fields__ if hasattr(row, name)}


def export(user: Any, conversations: Sequence[Conversation] | None = None) -> bytes:
    """Returns these conversations, or all of the user's and all passages, as a file.

    An answer that is being written stands in it as interrupted, with what there is of it.
    """
    shown = list(Conversation.objects.filter(owner=user).order_by("id")) if conversations is None else conversations
    passages = Passage.objects.filter(owner=user).order_by("id")
    rows, used = [], set()
    for each in shown:
        messages = []
        for message in _parents_first(each):
            row = _columns(message, MessageRow) | {"parent": message.parent_id, "passage": message.passage_id}
            if how := getattr(message, "generation", None):
                row["generation"] = _columns(how, GenerationRow)
                if how.status in LIVE:
                    row["generation"]["status"] = Status.INTERRUPTED
            if given := getattr(message, "feedback", None):
                row["feedback"] = _columns(given, FeedbackRow)
            used.add(message.passage_id)
            messages.append(row)
        used.add(each.passage_id)
        facts = {"messages": messages, "leaf": each.leaf_id, "passage": each.passage_id}
        rows.append(_columns(each, ConversationRow) | facts)
    if conversations is not None:
        passages = passages.filter(id__in=used - {None})
    data = {
        "format": FORMAT,
        "version": VERSION,
        "passages": [_columns(each, PassageRow) for each in passages],
        "conversations": rows,
    }
    return json.dumps(data, ensure_ascii=False, indent=1, default=_plain).encode()


def _parents_first(of: Conversation) -> Iterator[Message]:
    children: dict[UUID | None, list[Message]] = defaultdict(list)
    for message in of.messages.select_related("generation", "feedback").order_by("created", "id"):
        children[message.parent_id].append(message)
    waiting = children[None][::-1]
    while waiting:
        message = waiting.pop()
        yield message
        waiting += children[message.id][::-1]


def _plain(value: Any) -> Any:
    """Returns what JSON has no word for."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot stand in a file")


@transaction.atomic
def import_(user: Any, data: bytes) -> dict[str, int]:
    """Returns how many conversations, messages and passages of the file are new; all of it is there now.

    What is there already stays, save that the title and settings of a conversation changed later in the file, and
    feedback given later, count.

    Raises:
        UserError: It is not such a file.
    """
    try:
        file = msgspec.json.decode(services.without_nul(data), type=File)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not a file of conversations: {error}") from None
    new = {"conversations": 0, "messages": 0, "passages": 0}
    passages: dict[UUID, Passage] = {}
    for row in file.passages:
        passages[row.id], created = _passage(user, row)
        new["passages"] += created
    for conversation_row in file.conversations:
        created, messages = _conversation(user, conversation_row, passages)
        new["conversations"] += created
        new["messages"] += messages
    return new


def _standing_for(user: Any, id: UUID) -> UUID:
    """Returns the id that stands for one that is another's."""
    return uuid5(id, f"of user {user.pk}")


def _passage(user: Any, row: PassageRow) -> tuple[Passage, bool]:
    """Returns the user's passage of that text, and whether it is new."""
    there = Passage.objects.filter(owner=user, sha256=hashlib.sha256(row.text.encode()).hexdigest()).first()
    if there is not None:
        return there, False
    id = _standing_for(user, row.id) if Passage.objects.filter(id=row.id).exists() else row.id
    added = services.add_passage(user, row.text, row.title, id=id, created=row.created)
    return added, True


def _conversation(user: Any, row: ConversationRow, passages: Mapping[UUID, Passage]) -> tuple[bool, int]:
    """Returns whether the conversation is new, and how many of its messages are; all of it is there now."""
    taken = Conversation.objects.filter(id=row.id).exclude(owner=user).exists()
    id = _standing_for(user, row.id) if taken else row.id
    facts = {name: getattr(row, name) for name in ("model", "settings", "created", "updated", "archived", "deleted")}
    facts |= {"title": row.title[:200], "system_prompt": row.system_prompt, "passage": _in(passages, row.passage)}
    conversation, created = Conversation.objects.get_or_create(id=id, defaults=facts | {"owner": user})
    ids, new = _messages(user, conversation, row.messages, passages)
    if created or row.updated > conversation.updated:
        leaf = None if row.leaf is None else ids.get(row.leaf)
        Conversation.objects.filter(id=id).update(**facts, leaf_id=leaf)
    return created, new


def _in(passages: Mapping[UUID, Passage], id: UUID | None) -> Passage | None:
    if id is None:
        return None
    if id not in passages:
        raise UserError(f"passage {id} is not in the file")
    return passages[id]


def _messages(
    user: Any, conversation: Conversation, rows: Sequence[MessageRow], passages: Mapping[UUID, Passage]
) -> tuple[dict[UUID, UUID], int]:
    """Returns the ids that the file's stand for, and how many messages are new; all of them are there now."""
    there = Message.objects.only("conversation_id", "client_id").in_bulk([row.id for row in rows])
    foreign = {id for id, message in there.items() if message.conversation_id != conversation.id}
    ids = {row.id: _standing_for(user, row.id) if row.id in foreign else row.id for row in rows}
    known = dict(conversation.messages.values_list("id", "client_id"))
    client_ids = set(known.values())
    messages: dict[UUID, Message] = {}
    generations, feedback = [], []
    before: set[UUID] = set()
    for row in rows:
        _check(row, before)
        before.add(row.id)
        id, passage = ids[row.id], _in(passages, row.passage)
        if row.feedback is not None and row.role == Message.Role.ASSISTANT:
            feedback.append((id, row.feedback))
        if id in known:
            continue
        facts = {"role": row.role, "content": row.content, "created": row.created, "golds": row.golds}
        facts |= {"parent_id": None if row.parent is None else ids[row.parent], "passage": passage}
        facts["client_id"] = None if row.client_id in client_ids else row.client_id
        client_ids.add(row.client_id)
        messages[id] = Message(id=id, conversation=conversation, **facts)
        if row.generation is not None:
            generations.append(Generation(message=messages[id], **msgspec.structs.asdict(row.generation)))
    Message.objects.bulk_create(messages.values())
    Generation.objects.bulk_create(generations)
    _feedback(feedback)
    return ids, len(messages)


def _check(row: MessageRow, before: Set[UUID]) -> None:
    """The message has its place in the tree.

    Raises:
        UserError: It has none.
    """
    if row.id in before:
        raise UserError(f"message {row.id} stands twice in its conversation")
    if row.parent is not None and row.parent not in before:
        raise UserError(f"message {row.id}: its parent {row.parent} does not stand before it")
    answers = row.role == Message.Role.ASSISTANT
    if answers != (row.generation is not None) or (answers and row.parent is None):
        raise UserError(f"message {row.id}: an answer has a question before it and says how it came about")


def _feedback(rows: Sequence[tuple[UUID, FeedbackRow]]) -> None:
    """Each judgement that is newer than what is there is there now."""
    there = Feedback.objects.in_bulk([id for id, _ in rows])
    for id, row in rows:
        if id not in there or row.updated > there[id].updated:
            Feedback.objects.update_or_create(message_id=id, defaults=msgspec.structs.asdict(row))


def markdown(shown: Conversation) -> str:
    """Returns what a conversation shows, to be read by people."""
    parts = [f"# {shown.title or 'Conversation'}"]
    if shown.system_prompt:
        parts.append(f"**System:** {shown.system_prompt}")
    passage = None
    for message in selectors.path(shown.leaf_id):
        if message.role == Message.Role.USER:
            if message.passage and message.passage != passage:
                passage = message.passage
                quoted = "\n".join(f"> {line}" for line in passage.text.split("\n"))
                parts.append(f"**Passage:** {passage.title}\n\n{quoted}")
            parts.append(f"**You:** {message.content}")
        else:
            how = message.generation
            aside = "" if how.status == Status.DONE else f" ({how.get_status_display().lower()})"
            parts.append(f"**{how.model}**{aside}: {message.content}")
    return "\n\n".join(parts) + "\n"
