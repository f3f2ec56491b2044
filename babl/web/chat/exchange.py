"""Conversations out and in again: a JSON file with everything, or Markdown to be read.

A file names everything by its id, so importing it twice changes nothing. An id that another user has here stands, for
this user, for another one made of both; so nobody sees or changes what is another's.

A file is checked whole before anything of it is stored. It is stored in parts, so that nobody waits for more than one
of them; should one fail, what the others have added is taken out again.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal
from uuid import UUID, uuid5

import msgspec
from django.conf import settings
from django.db import DatabaseError, transaction
from msgspec import Meta

from babl.errors import UserError
from babl.web.chat import selectors, services
from babl.web.chat.database import write
from babl.web.chat.models import LIVE, Conversation, Feedback, Generation, Message, Passage, Status
from babl.web.engine.protocol import Settings

FORMAT, VERSION = "babl-conversations", 1
PART_SECONDS = 0.05  # of storing, before others have their turn
RETRY_SECONDS = 1.0  # after what could not be taken out
WAIT_SECONDS = 5.0  # for it, before the client is told of the failure
log = logging.getLogger("babl.web")

Moment = Annotated[datetime, Meta(tz=True)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]  # what every database has a column for
Name = Annotated[str, Meta(max_length=200)]
Hash = Annotated[str, Meta(max_length=64)]


class Row(msgspec.Struct):
    """Checks what its fields' types do not say: times that every database can store, and settings."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, datetime) and not 1 < value.year < 9999:
                raise UserError(f"{name} is in the year {value.year}, expected 2 to 9998")
            if name == "settings":
                try:
                    msgspec.convert(value, Settings)
                except msgspec.ValidationError as error:
                    raise UserError(f"settings: {error}") from None


class PassageRow(Row):
    """A passage in a file."""

    id: UUID
    title: str
    text: str
    created: Moment

    def __post_init__(self) -> None:
        super().__post_init__()
        services.passage_text(self.text)


class GenerationRow(Row):
    """How an answer came about, in a file."""

    kind: Literal["chat", "qa", "completion"]
    model: Name
    status: Literal["done", "stopped", "interrupted", "error"]
    with_context: bool = True
    comparison: UUID | None = None
    settings: dict[str, Any] = {}
    finish: Annotated[str, Meta(max_length=10)] = ""
    error: Annotated[str, Meta(max_length=10)] = ""
    error_message: str = ""
    prompt_tokens: Count | None = None
    cut_tokens: Count | None = None
    windows: Count | None = None
    tokens: Count | None = None
    log_prob: float | None = None
    probability: float | None = None
    span_start: Count | None = None
    span_end: Count | None = None
    first_seconds: float | None = None
    seconds: float | None = None
    weights: Hash = ""
    tokenizer: Hash = ""
    finished: Moment | None = None


class FeedbackRow(Row):
    """What the user thought of an answer, in a file."""

    good: bool
    updated: Moment
    right_start: Count | None = None
    right_end: Count | None = None
    no_answer: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        start, end = self.right_start, self.right_end
        if (start, end) != (None, None) and (start is None or end is None or start >= end or self.no_answer):
            raise UserError(f"the right answer is [{start}, {end}) and no_answer {self.no_answer}, which is no span")


class MessageRow(Row):
    """A message in a file; its parent stands before it."""

    id: UUID
    role: Literal["user", "assistant"]
    content: str
    created: Moment
    parent: UUID | None = None
    client_id: UUID | None = None
    passage: UUID | None = None
    golds: list[str] | None = None
    generation: GenerationRow | None = None
    feedback: FeedbackRow | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        answers = self.role == Message.Role.ASSISTANT
        if answers != (self.generation is not None) or (answers and self.parent is None):
            raise UserError(f"message {self.id}: an answer has a question before it and says how it came about")


class ConversationRow(Row):
    """A conversation in a file."""

    id: UUID
    title: str
    created: Moment
    updated: Moment
    messages: list[MessageRow]
    system_prompt: str = ""
    model: Name = ""
    settings: dict[str, Any] = {}
    passage: UUID | None = None
    leaf: UUID | None = None
    archived: Moment | None = None
    deleted: Moment | None = None

    def __post_init__(self) -> None:
        """The messages are a tree whose questions and answers take turns."""
        super().__post_init__()
        if len(self.system_prompt) > settings.PROMPT_CHARACTERS:
            length, most = len(self.system_prompt), settings.PROMPT_CHARACTERS
            raise UserError(f"system_prompt has {length} characters, expected at most {most}")
        roles: dict[UUID | None, str] = {None: Message.Role.ASSISTANT}  # a question may be the first
        for row in self.messages:
            if row.parent not in roles:
                raise UserError(f"message {row.id}: its parent {row.parent} does not stand before it")
            if roles[row.parent] == row.role:
                raise UserError(f"message {row.id} follows {row.parent}, and both are of the {row.role}")
            roles[row.id] = row.role
        if self.leaf not in roles:
            raise UserError(f"leaf {self.leaf} is none of the conversation's messages")


class File(msgspec.Struct):
    """All of a file."""

    format: Literal["babl-conversations"]
    version: Literal[1]
    passages: list[PassageRow]
    conversations: list[ConversationRow]

    def __post_init__(self) -> None:
        ids = [each.id for each in self.conversations]
        ids += [message.id for each in self.conversations for message in each.messages]
        if twice := next((id for id, number in Counter(ids).items() if number > 1), None):
            raise UserError(f"the id {twice} stands twice in the file")
        known = {row.id for row in self.passages}
        for each in self.conversations:
            for id in (each.passage, *(message.passage for message in each.messages)):
                if id is not None and id not in known:
                    raise UserError(f"passage {id} is not in the file")


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


async def import_(user: Any, data: bytes, later: Callable[[Coroutine[Any, Any, None]], asyncio.Task]) -> dict[str, int]:
    """Returns how many conversations, messages and passages of the file are new; all of it is there now.

    What is there already stays, save that the title and settings of a conversation changed later in the file, and
    feedback given later, count. A server that is killed meanwhile leaves a part; importing again brings the rest.

    Args:
        user: Whose it is to be.
        data: The file.
        later: Starts what takes out again what a failed import has added, which a full disk may hold up.

    Raises:
        UserError: It is not such a file, and nothing of it is stored.
    """
    importing = _Import(user)
    file = await asyncio.to_thread(_parse, data)
    try:
        await _in_parts(partial(importing.passage, row) for row in file.passages)
        await _in_parts(partial(importing.conversation, row) for row in file.conversations)
        await write(importing.change)
    except BaseException:
        await asyncio.wait([later(importing.take_all_out())], timeout=WAIT_SECONDS)
        raise
    return importing.new


def _parse(data: bytes) -> File:
    try:
        return msgspec.json.decode(services.without_nul(data), type=File)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not a file of conversations: {error}") from None
    except RecursionError:
        raise UserError("not a file of conversations: it is nested too deeply") from None


async def _in_parts(steps: Iterable[Callable[[], None]]) -> None:
    """All steps are taken, as many in one transaction as take `PART_SECONDS`."""
    waiting = deque(steps)

    @transaction.atomic
    def some() -> None:
        end = time.monotonic() + PART_SECONDS
        while waiting and time.monotonic() < end:
            waiting.popleft()()

    while waiting:
        await write(some)


class _Import:
    """A file on its way in.

    Attributes:
        user: Who owns what is new.
        new: How much of it there is.
        conversations: Ids of new ones, or of those that have new messages, and the messages' ids.
    """

    def __init__(self, user: Any):
        self.user = user
        self.new = {"conversations": 0, "messages": 0, "passages": 0}
        self.conversations: dict[UUID, list[UUID]] = {}
        self._created: set[UUID] = set()  # conversations
        self._passages: dict[UUID, Passage] = {}  # by their ids in the file
        self._new_passages: list[UUID] = []
        self._changes: list[tuple[UUID, dict[str, Any]]] = []  # of conversations that were there
        self._feedback: list[tuple[UUID, FeedbackRow]] = []

    def _standing_for(self, id: UUID) -> UUID:
        """Returns the id that stands for one that is another's."""
        return uuid5(id, f"of user {self.user.pk}")

    def passage(self, row: PassageRow) -> None:
        """The user has a passage of that text."""
        sha256 = hashlib.sha256(services.passage_text(row.text).encode()).hexdigest()
        there = Passage.objects.filter(owner=self.user, sha256=sha256).first()
        if there is None:
            taken = Passage.objects.filter(id=row.id).exists()
            id = self._standing_for(row.id) if taken else row.id
            there = services.add_passage(self.user, row.text, row.title[:200], id=id, created=row.created)
            self._new_passages.append(there.id)
            self.new["passages"] += 1
        self._passages[row.id] = there

    def conversation(self, row: ConversationRow) -> None:
        """The conversation is there with all of its messages; what it changes of what was there waits for `change`."""
        taken = Conversation.objects.filter(id=row.id).exclude(owner=self.user).exists()
        id = self._standing_for(row.id) if taken else row.id
        facts = {name: getattr(row, name) for name in ("model", "settings", "created", "updated")}
        facts |= {"archived": row.archived, "deleted": row.deleted, "title": row.title[:200]}
        facts |= {"system_prompt": row.system_prompt, "passage": row.passage and self._passages[row.passage]}
        shown, created = Conversation.objects.get_or_create(id=id, defaults=facts | {"owner": self.user})
        if created:
            self._created.add(id)
        ids = self._messages(shown, row.messages)
        leaf = {"leaf_id": row.leaf and ids[row.leaf]}
        if created:
            Conversation.objects.filter(id=id).update(**leaf)
        elif row.updated > shown.updated:
            self._changes.append((id, facts | leaf))
        self.new["conversations"] += created

    def _messages(self, shown: Conversation, rows: Sequence[MessageRow]) -> Mapping[UUID, UUID]:
        """Returns the ids that the file's stand for; all of the messages are there now."""
        there = Message.objects.only("conversation_id").in_bulk([row.id for row in rows])
        foreign = {id for id, message in there.items() if message.conversation_id != shown.id}
        ids = {row.id: self._standing_for(row.id) if row.id in foreign else row.id for row in rows}
        known = dict(shown.messages.values_list("id", "client_id"))
        client_ids = set(known.values())
        messages: list[Message] = []
        generations = []
        for row in rows:
            id = ids[row.id]
            if row.feedback is not None and row.role == Message.Role.ASSISTANT:
                self._feedback.append((id, row.feedback))
            if id in known:
                continue
            facts = {"role": row.role, "content": row.content, "created": row.created, "golds": row.golds}
            facts |= {
                "parent_id": row.parent and ids[row.parent],
                "passage": row.passage and self._passages[row.passage],
            }
            facts["client_id"] = None if row.client_id in client_ids else row.client_id
            client_ids.add(row.client_id)
            messages.append(Message(id=id, conversation=shown, **facts))
            if row.generation is not None:
                generations.append(Generation(message=messages[-1], **msgspec.structs.asdict(row.generation)))
        self.conversations[shown.id] = [message.id for message in messages]
        Message.objects.bulk_create(messages)
        Generation.objects.bulk_create(generations)
        self.new["messages"] += len(messages)
        return ids

    @transaction.atomic
    def change(self) -> None:
        """What the file says later than what was there counts."""
        for id, facts in self._changes:
            Conversation.objects.filter(id=id).update(**facts)
        there = Feedback.objects.in_bulk([id for id, _ in self._feedback])
        added = []
        for id, row in self._feedback:
            facts = msgspec.structs.asdict(row)
            if id not in there:
                added.append(Feedback(message_id=id, **facts))
            elif row.updated > there[id].updated:
                Feedback.objects.filter(message_id=id).update(**facts)
        Feedback.objects.bulk_create(added)

    async def take_all_out(self) -> None:
        """What was added is gone, however long that takes where the disk is full."""
        while True:
            try:
                await _in_parts([partial(self.take_out, id) for id in (*self.conversations, None)])
                return
            except DatabaseError as error:
                log.error("a part of a file cannot be taken out yet (%s); trying again", type(error).__name__)
                await asyncio.sleep(RETRY_SECONDS)

    def take_out(self, id: UUID | None) -> None:
        """What was added to this conversation is gone; without an id, passages that nothing uses then."""
        if id is None:
            services.delete_unused(self._new_passages)
        elif id in self._created:
            Conversation.objects.filter(id=id).delete()
        else:
            Message.objects.filter(id__in=self.conversations[id]).delete()


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
