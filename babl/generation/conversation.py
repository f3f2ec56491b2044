"""What a conversation becomes in ids, and what of it fits: the terminal, the browser and the API all ask here."""

import sys
import tomllib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from babl.data.collate import make_prompts
from babl.data.contexts import View
from babl.errors import UserError
from babl.generation.engine import Engine, prompt_limit
from babl.models.weights import FAMILIES
from babl.text import Tokenizer, load_tokenizer
from babl.text.prompts import Message, Style, chat_ids, qa_prompt, system_message

MOST_PROMPT = 2048  # tokens, where the architecture has no bound of its own
MOST_WINDOWS = 256
WINDOW, STRIDE = 512, 128  # tokens, for a model that does not say what it was trained with
ANSWER_ROOM = 64  # tokens of the context that a question leaves for its answer
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Reader:
    """What decides how a model reads, without its weights.

    Attributes:
        tokenizer: The model's.
        style: Of its questions.
        context: Most tokens of prompt and answer together; None where there is no bound.
        window: Longest prompt, in tokens, of a question with its context, as in training.
        stride: Tokens that neighbouring windows share.
    """

    tokenizer: Tokenizer
    style: Style
    context: int | None = None
    window: int = WINDOW
    stride: int = STRIDE

    @classmethod
    def of(cls, folder: Path, family: str, context: int | None, tokenizer: Tokenizer | None = None) -> "Reader":
        """Returns the reader of a model folder; a checkpoint of a run says how its questions were windowed.

        Args:
            folder: Holds the tokenizer and perhaps a run.toml.
            family: The config's model_type.
            context: Of the model, in tokens; None where it has no bound.
            tokenizer: The folder's, where it is loaded already.

        Raises:
            UserError: A file cannot be read.
        """
        window, stride, run = WINDOW, STRIDE, folder / "run.toml"
        if run.is_file():
            try:
                data = tomllib.loads(run.read_text(encoding="utf-8"))["data"]
                window, stride = int(data["max_source_tokens"]), int(data["stride"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{run}: not the configuration of a run ({error})") from None
        style: Style = "t5" if FAMILIES[family].model.is_encoder_decoder else "decoder"
        return cls(tokenizer or load_tokenizer(folder), style, context, window, stride)

    @property
    def most(self) -> int:
        """Most tokens of a prompt; one is left for the answer."""
        return MOST_PROMPT if self.context is None else self.context - 1


def prompt_style(engine: Engine, chat: bool, before: Sequence[Message] = ()) -> Style:
    """Returns how prompts are worded: as in training, or by the model's chat template where that is asked for.

    Args:
        engine: Of the model that is asked.
        chat: Whether its chat template is asked for.
        before: What stands before each prompt, see `prompt_ids`.

    Raises:
        UserError: There is no chat template where one is asked for, a system message without one, or an example for an
            encoder-decoder, which reads a single question.
    """
    if any(message["role"] == "system" for message in before) and not chat:
        raise UserError("--system is for a model's chat template; ask for it with --chat")
    if any(message["role"] == "assistant" for message in before) and engine.style == "t5":
        raise UserError(f"--shots: {engine.name} is a T5, which reads one question; worked examples need a decoder")
    if chat and (engine.style == "t5" or not engine.tokenizer.chat_template):
        raise UserError(f"--chat: {engine.name} has no chat template; leave --chat out")
    return "chat" if chat else engine.style


@dataclass(frozen=True)
class Worded:
    """What a model reads to give the next answer.

    Attributes:
        prompts: In ids; several where the context is read through windows.
        windows: Code points of the context that each shows; empty where a chat template has worded the conversation.
        context: What the windows show parts of; None where the question stands alone.
        dropped: Earlier messages that are not read.
        cut_tokens: Of all that was said and is not read.
        limit: Tokens that one prompt should not exceed.
        question: Whether the answer is that to a question, which ends at `ANSWER_END` and of several windows' is the
            likeliest; otherwise what the model says is shown as it is written.
    """

    prompts: list[list[int]]
    windows: list[tuple[int, int]]
    context: str | None
    dropped: int
    cut_tokens: int
    limit: int
    question: bool


def word_conversation(messages: Sequence[Message], context: str | None, reader: Reader, max_new_tokens: int) -> Worded:
    """Returns what the model reads of a conversation.

    A chat template words all of it, the context before the last question. The oldest messages give way where there is
    no room, a question with its answer, and no more of them than must. A model without a chat template, and every T5,
    answers one question at a time: it reads the last one alone, worded as in training. There T5 takes the system
    message for the context where no other is given; a decoder does not read it.

    Args:
        messages: Of system, user and assistant; the last one is the user's.
        context: A passage the last question is about; None or empty for none.
        reader: The model's.
        max_new_tokens: Of the answer.

    Raises:
        UserError: The messages are not a conversation, the template fails, or the question leaves no room for the
            context.
    """
    strange = next((message["role"] for message in messages if message["role"] not in ROLES), None)
    if strange is not None:
        raise UserError(f"a message's role is {strange!r}, expected one of {', '.join(ROLES)}")
    if not messages or messages[-1]["role"] != "user":
        raise UserError("the last message is not the user's, so there is nothing to answer")
    *earlier, last = [message for message in messages if message["role"] != "system"]
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    if reader.style == "t5" or not reader.tokenizer.chat_template:
        if reader.style == "t5" and not context:
            context, system = system, ""
        unread = [*(message["content"] for message in earlier), *([system] if system else [])]
        worded = word_question(last["content"], context, reader, max_new_tokens, unread, len(earlier))
        return replace(worded, question=reader.style == "t5" or bool(context))  # without a passage, a decoder may talk
    return _templated(earlier, last["content"], system, context, reader, max_new_tokens)


def _templated(
    earlier: Sequence[Message], question: str, system: str, context: str | None, reader: Reader, max_new_tokens: int
) -> Worded:
    told = system_message(system)
    asked = Message(role="user", content=qa_prompt(question, context or None, "chat"))

    def read(dropped: int) -> list[int]:
        return chat_ids([*told, *earlier[dropped:], asked], reader.tokenizer)

    room = prompt_limit(reader.context, max_new_tokens) or MOST_PROMPT
    whole = ids = read(0)
    dropped = 0
    if len(whole) > room:
        drops = range(0, len(earlier) + 2, 2)
        dropped = drops[min(bisect_left(drops, True, key=lambda n: len(read(n)) <= room), len(drops) - 1)]
        ids = read(dropped)
    return Worded([ids], [], context or None, min(dropped, len(earlier)), len(whole) - len(ids), room, False)


def word_question(
    question: str,
    context: str | None,
    reader: Reader,
    max_new_tokens: int,
    unread: Sequence[str] = (),
    dropped: int = 0,
) -> Worded:
    """Returns what the model reads of a question, worded as in training.

    Args:
        question: Never cut.
        context: Read through windows where it is long; None or empty for none.
        reader: The model's.
        max_new_tokens: Of the answer.
        unread: Texts that were said besides and are not read.
        dropped: How many of them are messages.

    Raises:
        UserError: The question leaves no room for the context, or there are too many windows.
    """
    room = prompt_limit(reader.context, min(max_new_tokens, ANSWER_ROOM))
    window = reader.window if room is None else min(reader.window, room)
    view = View("asked", question, context or None)
    most = sys.maxsize if view.context is None else window  # a question alone is no window; whoever asks it checks it
    prompts, overlong = make_prompts([view], reader.tokenizer, most, min(reader.stride, window // 4), reader.style)
    if overlong:
        raise UserError(
            f"the question leaves too little room for its context: this model reads {window} tokens at a time"
        )
    if len(prompts) > MOST_WINDOWS:
        raise UserError(f"the context takes {len(prompts)} windows of {window} tokens, expected at most {MOST_WINDOWS}")
    cut = sum(map(len, reader.tokenizer.encode_batch(unread))) if unread else 0
    limit = reader.most if view.context is None else window
    return Worded(
        [prompt.ids for prompt in prompts], [prompt.span for prompt in prompts], view.context, dropped, cut, limit, True
    )
