"""The types of an export file. Decoding checks all that a file must keep, before anything of it is stored."""

from collections import Counter
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from django.conf import settings
from msgspec import Meta

from babl.errors import UserError
from babl.web.chat import services
from babl.web.chat.models import Message
from babl.web.engine.protocol import Settings

FORMAT, VERSION = "babl-conversations", 1

Moment = Annotated[datetime, Meta(tz=True)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]  # what every database has a column for
Name = Annotated[str, Meta(max_length=200)]
Hash = Annotated[str, Meta(max_length=64)]


class Row(msgspec.Struct):
    """Checks what the types of its fields cannot: times that every database can store, and settings."""

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
    """An answer's `Generation` in a file: a field for each of its columns."""

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
    """The user's feedback on an answer, in a file."""

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
            raise UserError(f"the right answer is [{start}, {end}) and no_answer {self.no_answer}, which is not a span")


class MessageRow(Row):
    """A message in a file; its parent comes before it."""

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
            raise UserError(f"message {self.id}: an answer needs a question before it and a generation")


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
        """Checks that the messages are a tree in which questions and answers alternate."""
        super().__post_init__()
        if len(self.system_prompt) > settings.PROMPT_CHARACTERS:
            length, most = len(self.system_prompt), settings.PROMPT_CHARACTERS
            raise UserError(f"system_prompt has {length} characters, expected at most {most}")
        roles: dict[UUID | None, str] = {None: Message.Role.ASSISTANT}  # a question may be the first
        for row in self.messages:
            if row.parent not in roles:
                raise UserError(f"message {row.id}: its parent {row.parent} does not come before it")
            if roles[row.parent] == row.role:
                raise UserError(f"message {row.id} follows {row.parent}, and both are of the {row.role}")
            roles[row.id] = row.role
        if self.leaf not in roles:
            raise UserError(f"leaf {self.leaf} is none of the conversation's messages")


class File(msgspec.Struct):
    """A file."""

    format: Literal["babl-conversations"]
    version: Literal[1]
    passages: list[PassageRow]
    conversations: list[ConversationRow]

    def __post_init__(self) -> None:
        ids = [each.id for each in self.conversations]
        ids += [message.id for each in self.conversations for message in each.messages]
        if twice := next((id for id, number in Counter(ids).items() if number > 1), None):
            raise UserError(f"the id {twice} occurs twice in the file")
        known = {row.id for row in self.passages}
        for each in self.conversations:
            for id in (each.passage, *(message.passage for message in each.messages)):
                if id is not None and id not in known:
                    raise UserError(f"passage {id} is not in the file")
