"""What a model reads of a request, and what of it does not fit."""

import sys
import tomllib
from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path

from babl.data.collate import make_prompts
from babl.data.contexts import View
from babl.errors import UserError
from babl.generation import GenerationConfig
from babl.generation.engine import prompt_limit
from babl.generation.sampling import LOOKUP_TOKENS
from babl.generation.session import Session
from babl.text import Tokenizer, load_tokenizer
from babl.text.prompts import Message as Turn
from babl.text.prompts import Style, prompt_ids
from babl.web.engine.protocol import (
    ChatRequest,
    CompletionRequest,
    Counted,
    Message,
    QARequest,
    Request,
    Settings,
)

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
    def of(cls, folder: Path, family: str, context: int | None) -> "Reader":
        """Returns the reader of a model folder; a checkpoint of a run says how its questions were windowed.

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
        return cls(load_tokenizer(folder), "t5" if family == "t5" else "decoder", context, window, stride)

    @property
    def most(self) -> int:
        """Most tokens of a prompt; one is left for the answer."""
        return MOST_PROMPT if self.context is None else self.context - 1


@dataclass(frozen=True)
class Prepared:
    """A request as a model reads it.

    Attributes:
        prompts: In ids; several where the context is read through windows.
        windows: Code points of the context that each shows; empty where the request is not a question as in training.
        context: In which the answer is located.
        config: Of the answers.
        cut_tokens: Of what was sent and is not read.
        limit: Tokens that one prompt should not exceed.
        most: Tokens that none can exceed.
    """

    prompts: list[list[int]]
    windows: list[tuple[int, int]]
    context: str | None
    config: GenerationConfig
    cut_tokens: int
    limit: int
    most: int

    @property
    def tokens(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.prompts))

    def counted(self) -> Counted:
        """Returns the figures for who has not sent it yet."""
        over = sum(max(0, len(prompt) - self.most) for prompt in self.prompts)
        return Counted(self.tokens - over, self.limit, self.cut_tokens + over, len(self.prompts))

    def check(self) -> None:
        """It can be read; nothing is cut off a question or the last message.

        Raises:
            UserError: It does not, or there is nothing to read.
        """
        if not all(self.prompts):
            raise UserError("the prompt is empty, and this model has no token to begin with")
        longest = max(map(len, self.prompts))
        if longest > self.most:
            raise UserError(f"the prompt has {longest} tokens, but this model reads at most {self.most}")


def prepare(request: Request, reader: Reader) -> Prepared:
    """Returns what the model reads.

    A question is worded as in training. So is the last message of a chat for T5, which knows nothing else, and for a
    decoder without a chat template where there is a context; the system message is T5's context where there is no
    other. A chat template words all the conversation; without one, what was said so far is the text that goes on. The
    oldest messages give way, and are counted.

    Raises:
        UserError: The messages are not a conversation, or the context is too long even for windows.
    """
    config = _config(request.settings)
    if isinstance(request, CompletionRequest):
        return Prepared(_encode(request.prompt, reader), [], None, config, 0, reader.most, reader.most)
    if isinstance(request, QARequest):
        return _question(request.question, request.context, config, 0, reader)
    return _chat(request, config, reader)


def _config(settings: Settings) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        stop_strings=tuple(settings.stop),
        seed=settings.seed,
    )


def _chat(request: ChatRequest, config: GenerationConfig, reader: Reader) -> Prepared:
    strange = next((message.role for message in request.messages if message.role not in ROLES), None)
    if strange is not None:
        raise UserError(f"a message's role is {strange!r}, expected one of {', '.join(ROLES)}")
    if not request.messages or request.messages[-1].role != "user":
        raise UserError("the last message is not the user's, so there is nothing to answer")
    *earlier, last = [message for message in request.messages if message.role != "system"]
    system = "\n\n".join(message.content for message in request.messages if message.role == "system")
    context = request.context or None
    templated = bool(reader.tokenizer.chat_template) and reader.style == "decoder"
    if reader.style == "t5" or (context and not templated):
        unread = [message.content for message in earlier]
        if reader.style == "t5" and context is None and system:
            context = system
        elif system:
            unread.append(system)
        cut = sum(map(len, reader.tokenizer.encode_batch(unread))) if unread else 0
        return _question(last.content, context, config, cut, reader)
    room = prompt_limit(reader.context, config.max_new_tokens) or MOST_PROMPT

    def read(dropped: int) -> list[int]:
        return _conversation([*earlier[dropped:], last], system, context, reader)

    whole = ids = read(0)
    if len(whole) > room:  # a question is dropped with its answer, and no more of them than must be
        drops = range(0, len(earlier) + 2, 2)
        ids = read(drops[min(bisect_left(drops, True, key=lambda n: len(read(n)) <= room), len(drops) - 1)])
    return Prepared([ids], [], context, config, len(whole) - len(ids), room, reader.most)


def _conversation(messages: list[Message], system: str, context: str | None, reader: Reader) -> list[int]:
    if reader.tokenizer.chat_template:
        turns: list[Turn] = [{"role": message.role, "content": message.content} for message in messages]
        ids, _ = Session("", system, context or "", turns).prompt(reader.tokenizer, reader.style, None)
        return ids
    said = [system] if system else []
    return _encode("\n".join([*said, *(message.content for message in messages)]), reader)[0]


def _question(question: str, context: str | None, config: GenerationConfig, cut: int, reader: Reader) -> Prepared:
    room = prompt_limit(reader.context, min(config.max_new_tokens, ANSWER_ROOM))
    window = reader.window if room is None else min(reader.window, room)
    view = View("asked", question, context or None)
    most = sys.maxsize if view.context is None else window  # a question alone is no window, and checked by its reader
    prompts, overlong = make_prompts([view], reader.tokenizer, most, min(reader.stride, window // 4), reader.style)
    if overlong:
        raise UserError(
            f"the question leaves too little room for its context: this model reads {window} tokens at a time"
        )
    if len(prompts) > MOST_WINDOWS:
        raise UserError(f"the context takes {len(prompts)} windows of {window} tokens, expected at most {MOST_WINDOWS}")
    if config.greedy:  # answers stand in their contexts more often than not
        config = replace(config, prompt_lookup_num_tokens=LOOKUP_TOKENS)
    ids = prompt_ids([prompt.text for prompt in prompts], reader.tokenizer, reader.style)
    limit = reader.most if view.context is None else window
    return Prepared(ids, [prompt.span for prompt in prompts], view.context, config, cut, limit, reader.most)


def _encode(text: str, reader: Reader) -> list[list[int]]:
    return prompt_ids([text], reader.tokenizer, reader.style)
