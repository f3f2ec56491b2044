"""Export: a user's conversations as a file."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from babl.web.chat import selectors
from babl.web.chat.exchange.format import (
    FORMAT,
    VERSION,
    ConversationRow,
    FeedbackRow,
    GenerationRow,
    MessageRow,
    PassageRow,
)
from babl.web.chat.models import LIVE, Conversation, Message, Passage, Status


def export_json(user: Any, conversations: Sequence[Conversation] | None = None) -> bytes:
    """Returns a file of these conversations, or of all of the user's conversations and passages.

    An answer that is still being written is exported as interrupted, with its text so far.
    """
    shown = list(Conversation.objects.filter(owner=user).order_by("id")) if conversations is None else conversations
    passages = Passage.objects.filter(owner=user).order_by("id")
    rows, used = [], set()
    for each in shown:
        messages = []
        for message in _parents_first(each):
            row = _columns(message, MessageRow) | {"parent": message.parent_id, "passage": message.passage_id}
            if generation := getattr(message, "generation", None):
                row["generation"] = _columns(generation, GenerationRow)
                if generation.status in LIVE:
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
    return json.dumps(data, ensure_ascii=False, indent=1, default=_to_text).encode()


def _parents_first(conversation: Conversation) -> Iterator[Message]:
    children: dict[UUID | None, list[Message]] = defaultdict(list)
    for message in conversation.messages.select_related("generation", "feedback").order_by("created", "id"):
        children[message.parent_id].append(message)
    waiting = children[None][::-1]
    while waiting:
        message = waiting.pop()
        yield message
        waiting += children[message.id][::-1]


def _to_text(value: Any) -> Any:
    """Returns times and ids as JSON has them."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot stand in a file")


def export_markdown(shown: Conversation) -> str:
    """Returns the branch of a conversation that is shown, as Markdown."""
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
            generation = message.generation
            aside = "" if generation.status == Status.DONE else f" ({generation.get_status_display().lower()})"
            parts.append(f"**{generation.model}**{aside}: {message.content}")
    return "\n\n".join(parts) + "\n"


def _columns(row: Any, kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in kind.__struct_fields__ if hasattr(row, name)}
