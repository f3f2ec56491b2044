"""What the engine is asked for an answer: a conversation or a question as one of its requests."""

from collections.abc import Sequence
from typing import Any, Literal
from uuid import UUID

import msgspec

from babl.web.chat import selectors
from babl.web.chat.models import Conversation, Generation, Message, Passage, Status
from babl.web.engine.protocol import ChatRequest, CompletionRequest, QARequest, Request, Settings
from babl.web.engine.protocol import Message as Turn


class Draft(msgspec.Struct, forbid_unknown_fields=True):
    """A question that is not sent yet.

    Attributes:
        content: The question.
        model: Would answer it.
        conversation: Where it would be asked; None for a new one.
        parent: The answer that it would follow.
        passage: What it is about.
        kind: Of `Generation.Kind`.
        settings: Of the answer.
    """

    content: str
    model: str
    conversation: UUID | None = None
    parent: UUID | None = None
    passage: UUID | None = None
    kind: Literal["chat", "qa", "completion"] = "qa"
    settings: Settings = Settings()


def answer_request(answer: Generation) -> Request:
    """Returns the engine's request for an answer that is stored.

    Raises:
        msgspec.ValidationError: Its settings are not `Settings`, stored before they were checked.
    """
    question, conversation = answer.message.parent, answer.message.conversation
    passage = question.passage if answer.with_context else None
    messages = selectors.path(question.id) if answer.kind == Generation.Kind.CHAT else [question]
    return _request(str(answer.message_id), conversation, answer, messages, passage)


def draft_request(user: Any, draft: Draft) -> Request:
    """Returns the engine's request for a question if it were sent now; stores nothing."""
    shown = selectors.conversation(user, draft.conversation) if draft.conversation else Conversation(owner=user)
    passage = selectors.passage(user, draft.passage) if draft.passage else None
    messages = [Message(role=Message.Role.USER, content=draft.content)]
    if draft.parent is not None and draft.kind == Generation.Kind.CHAT:
        parent = Message.objects.get(conversation=shown, id=draft.parent)
        messages = [*selectors.path(parent.id), *messages]
    return _request("draft", shown, draft, messages, passage)


def _request(
    id: str, shown: Conversation, how: Generation | Draft, messages: Sequence[Message], passage: Passage | None
) -> Request:
    user, context, content = str(shown.owner_id), passage.text if passage else None, messages[-1].content
    settings = msgspec.convert(how.settings, Settings)
    if how.kind == Generation.Kind.COMPLETION:
        return CompletionRequest(id=id, user=user, model=how.model, prompt=content, settings=settings)
    if how.kind == Generation.Kind.QA:
        return QARequest(id=id, user=user, model=how.model, question=content, context=context, settings=settings)
    turns = [Turn(role="system", content=shown.system_prompt)] if shown.system_prompt else []
    turns += _history(messages)
    return ChatRequest(id=id, user=user, model=how.model, messages=turns, settings=settings, context=context)


def _history(messages: Sequence[Message]) -> list[Turn]:
    """Returns the turns that the model reads of a conversation that ends with a question.

    A question whose answer broke off by itself is left out with it: the model would answer that one first.
    """
    *before, question = messages
    turns = []
    for asked, answered in zip(before[::2], before[1::2], strict=True):
        if answered.generation.status in (Status.DONE, Status.STOPPED) and answered.content:
            turns += [Turn(role=m.role, content=m.content) for m in (asked, answered)]
    return [*turns, Turn(role="user", content=question.content)]
