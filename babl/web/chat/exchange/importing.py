"""Import: a file's conversations become the user's.

An id that another user has here stands, for this user, for another id made of both, so nobody sees or changes what is
another's. A file is stored in parts, so that nobody waits for more than one of them; if one fails, what the others have
added is deleted again.
"""

import asyncio
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from uuid import UUID, uuid5

import msgspec
from django.db import DatabaseError, transaction

from babl.errors import UserError
from babl.web.chat import services
from babl.web.chat.database import write
from babl.web.chat.exchange.format import ConversationRow, FeedbackRow, File, MessageRow, PassageRow
from babl.web.chat.models import Conversation, Feedback, Generation, Message, Passage

PART_SECONDS = 0.05  # of storing, before other requests have their turn
RETRY_SECONDS = 1.0  # after a failed deletion of what was added
WAIT_SECONDS = 5.0  # for that deletion, before the client is told of the failure
log = logging.getLogger("babl.web")


async def import_file(
    user: Any, data: bytes, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task]
) -> dict[str, int]:
    """Imports a file; returns how many of its conversations, messages and passages are new.

    Existing rows stay as they are, except for titles, settings and feedback that are newer in the file. If the server
    is killed meanwhile, a part is stored; importing again adds the rest.

    Args:
        user: The new owner.
        data: The file.
        spawn: Starts a task that deletes what a failed import has added, which takes long if the disk is full.

    Raises:
        UserError: The file is not an export; nothing of it is stored.
    """
    importer = _Importer(user)
    file = await asyncio.to_thread(_parse, data)
    try:
        await _in_parts(partial(importer.add_passage, row) for row in file.passages)
        await _in_parts(partial(importer.add_conversation, row) for row in file.conversations)
        await write(importer.update_existing)
    except BaseException:
        await asyncio.wait([spawn(importer.roll_back())], timeout=WAIT_SECONDS)
        raise
    return importer.counts


def _parse(data: bytes) -> File:
    try:
        return msgspec.json.decode(services.without_nul(data), type=File)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not a file of conversations: {error}") from None
    except RecursionError:
        raise UserError("not a file of conversations: it is nested too deeply") from None


async def _in_parts(steps: Iterable[Callable[[], None]]) -> None:
    """Runs the steps in transactions that take `PART_SECONDS` each."""
    waiting = deque(steps)

    @transaction.atomic
    def some() -> None:
        end = time.monotonic() + PART_SECONDS
        while waiting and time.monotonic() < end:
            waiting.popleft()()

    while waiting:
        await write(some)


class _Importer:
    """Stores a file's rows, and keeps account of what was added.

    Attributes:
        user: The new owner.
        counts: How many rows were added.
        conversations: Ids of conversations with new messages, and the messages' ids.
    """

    def __init__(self, user: Any):
        self.user = user
        self.counts = {"conversations": 0, "messages": 0, "passages": 0}
        self.conversations: dict[UUID, list[UUID]] = {}
        self._created: set[UUID] = set()  # conversations
        self._passages: dict[UUID, Passage] = {}  # by their ids in the file
        self._new_passages: list[UUID] = []
        self._updates: list[tuple[UUID, dict[str, Any]]] = []  # of existing conversations
        self._feedback: list[tuple[UUID, FeedbackRow]] = []

    def _own_id(self, id: UUID) -> UUID:
        """Returns the id that replaces one that another user has."""
        return uuid5(id, f"of user {self.user.pk}")

    def add_passage(self, row: PassageRow) -> None:
        """Stores a passage, unless the user has one with the same text."""
        sha256 = hashlib.sha256(services.passage_text(row.text).encode()).hexdigest()
        there = Passage.objects.filter(owner=self.user, sha256=sha256).first()
        if there is None:
            taken = Passage.objects.filter(id=row.id).exists()
            id = self._own_id(row.id) if taken else row.id
            there = services.add_passage(self.user, row.text, row.title[:200], id=id, created=row.created)
            self._new_passages.append(there.id)
            self.counts["passages"] += 1
        self._passages[row.id] = there

    def add_conversation(self, row: ConversationRow) -> None:
        """Stores a conversation and its messages; changes of existing ones wait for `update_existing`."""
        taken = Conversation.objects.filter(id=row.id).exclude(owner=self.user).exists()
        id = self._own_id(row.id) if taken else row.id
        facts = {name: getattr(row, name) for name in ("model", "settings", "created", "updated")}
        facts |= {"archived": row.archived, "deleted": row.deleted, "title": row.title[:200]}
        facts |= {"system_prompt": row.system_prompt, "passage": row.passage and self._passages[row.passage]}
        shown, created = Conversation.objects.get_or_create(id=id, defaults=facts | {"owner": self.user})
        if created:
            self._created.add(id)
        ids = self._add_messages(shown, row.messages)
        leaf = {"leaf_id": row.leaf and ids[row.leaf]}
        if created:
            Conversation.objects.filter(id=id).update(**leaf)
        elif row.updated > shown.updated:
            self._updates.append((id, facts | leaf))
        self.counts["conversations"] += created

    def _add_messages(self, shown: Conversation, rows: Sequence[MessageRow]) -> Mapping[UUID, UUID]:
        """Stores the messages that are new; returns the id of each, by its id in the file."""
        there = Message.objects.only("conversation_id").in_bulk([row.id for row in rows])
        foreign = {id for id, message in there.items() if message.conversation_id != shown.id}
        ids = {row.id: self._own_id(row.id) if row.id in foreign else row.id for row in rows}
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
        self.counts["messages"] += len(messages)
        return ids

    @transaction.atomic
    def update_existing(self) -> None:
        """Updates existing conversations and feedback that are newer in the file."""
        for id, facts in self._updates:
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

    async def roll_back(self) -> None:
        """Deletes what was added, and retries until that succeeds; the disk may be full."""
        while True:
            try:
                await _in_parts([partial(self._delete_added, id) for id in (*self.conversations, None)])
                return
            except DatabaseError as error:
                log.error("a failed import cannot be deleted yet (%s); trying again", type(error).__name__)
                await asyncio.sleep(RETRY_SECONDS)

    def _delete_added(self, id: UUID | None) -> None:
        """Deletes what was added to this conversation; without an id, the passages that are unused then."""
        if id is None:
            services.delete_unused(self._new_passages)
        elif id in self._created:
            Conversation.objects.filter(id=id).delete()
        else:
            Message.objects.filter(id__in=self.conversations[id]).delete()
