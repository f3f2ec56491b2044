"""A conversation: what was said, what of it a model reads next, and the file it is kept in."""

import json
import os
import secrets
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from babl.errors import UserError
from babl.text import Tokenizer
from babl.text.prompts import Message, Style, chat_ids, prompt_ids, qa_prompt


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

    def prompt(self, tokenizer: Tokenizer, style: Style, most: int | None) -> tuple[list[int], int]:
        """Returns the ids that ask for the next answer, and how many earlier messages had no room in them.

        A model with a chat template reads the conversation, the context before the last question. A base model reads
        that question alone, worded as in training.

        Args:
            tokenizer: The model's.
            style: The family's wording of questions.
            most: Ids there is room for; None for any number. The last question is never left out.
        """
        question = self.messages[-1]["content"]
        if not tokenizer.chat_template:
            (ids,) = prompt_ids([qa_prompt(question, self.context or None, style)], tokenizer, style)
            return ids, 0
        asked = f"Context: {self.context}\n\n{question}" if self.context else question
        earlier = self.messages[:-1]
        dropped = 0
        while True:
            system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
            ids = chat_ids([*system, *earlier[dropped:], {"role": "user", "content": asked}], tokenizer)
            if most is None or len(ids) <= most or dropped >= len(earlier):
                return ids, dropped
            dropped += 2  # a question goes with its answer

    def save(self) -> Path:
        """Returns the file, which has all that was said."""
        folder = conversations()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{self.id}.json"
            aside = file.with_suffix(".part")
            aside.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            aside.replace(file)
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
