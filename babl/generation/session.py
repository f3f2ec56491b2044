"""A conversation in the terminal: what was said, and the file it is kept in."""

import itertools
import json
import os
import secrets
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from babl.errors import UserError
from babl.files import write_whole
from babl.generation.conversation import Reader, Worded, word_conversation
from babl.text.prompts import Message, system_message


def conversations() -> Path:
    """Returns the folder conversations are kept in: `BABL_HOME`, else ~/.babl, and conversations/ in it."""
    return Path(os.environ.get("BABL_HOME", Path.home() / ".babl")) / "conversations"


def _new_id() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


@dataclass
class Session:
    """What was said to a model and what it answered.

    Attributes:
        model: Its folder.
        system: What it is told before everything else; only a chat template has a place for it.
        context: A passage the questions are about; empty for none.
        messages: Of user and assistant in turn.
        id: Names the file.
    """

    model: str
    system: str = ""
    context: str = ""
    messages: list[Message] = field(default_factory=list)
    id: str = field(default_factory=_new_id)

    def say(self, role: str, content: str) -> None:
        """The message is the last one said."""
        self.messages.append({"role": role, "content": content})

    def worded(self, reader: Reader, max_new_tokens: int) -> Worded:
        """Returns what a model reads to answer the last question, see `word_conversation`."""
        answered = [
            message
            for message, after in itertools.pairwise(self.messages)
            if (message["role"], after["role"]) != ("user", "user")  # the program ended before there was an answer
        ]
        messages = [*system_message(self.system), *answered, *self.messages[-1:]]
        return word_conversation(messages, self.context, reader, max_new_tokens)

    def save(self) -> Path:
        """Returns the file, which has all that was said."""
        folder = conversations()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{self.id}.json"
            write_whole(file, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}); set BABL_HOME to another folder") from None
        return file

    @classmethod
    def load(cls, id: str) -> "Session":
        """Returns the conversation with this id.

        Raises:
            UserError: There is none, or its file is damaged.
        """
        file = conversations() / f"{id}.json"
        try:
            session = cls(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            known = sorted(path.stem for path in file.parent.glob("*.json"))
            newest = f"; the newest is {known[-1]}" if known else ""
            raise UserError(f"--resume: no conversation {id!r} in {file.parent}{newest}") from None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file}: not a conversation that can be read ({error})") from None
        return session

    def markdown(self) -> str:
        """Returns the conversation to be read by people."""
        parts = [f"# {self.id}\n\nmodel: {self.model}"]
        parts += [f"**system:** {self.system}"] if self.system else []
        parts += [f"**context:** {self.context}"] if self.context else []
        parts += [f"**{message['role']}:** {message['content']}" for message in self.messages]
        return "\n\n".join(parts) + "\n"
