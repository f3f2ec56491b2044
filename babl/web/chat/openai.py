"""The wire format of OpenAI's API: requests as its clients send them, and responses."""

import itertools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from babl.errors import UserError
from babl.web.chat.endpoint import ApiError
from babl.web.engine.protocol import (
    BOUNDS,
    ChatRequest,
    CompletionRequest,
    Done,
    Message,
    Reading,
    Settings,
    TokenScore,
)

# Parameters of OpenAI's that would change the answer and are not supported: accepted only with values that change
# nothing, the first of which is OpenAI's default.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("echo", "logprobs"), (False,)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "top_logprobs"), (0,)),
    **dict.fromkeys(("n", "best_of"), (1,)),
    **dict.fromkeys(("tools", "functions"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "suffix": ("",),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# Parameters that do not change the answer.
IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")
)
MAX_LIKELIEST = 20  # tokens listed for each
MAX_CHOICES = 32  # answers to one request
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}


def unsupported_parameter(name: str, message: str) -> ApiError:
    """Returns the error for a parameter that is not supported."""
    return ApiError(400, "unsupported_parameter", message, param=name)


class Part(msgspec.Struct):
    """A part of a message; only text is supported."""

    type: str
    text: str = ""


class ChatMessage(msgspec.Struct):
    """A turn of a conversation."""

    role: str
    content: str | list[Part] | None = None
    tool_calls: list[Any] | None = None


class StreamOptions(msgspec.Struct):
    """Options of a stream."""

    include_usage: bool = False


class Sampling(msgspec.Struct, kw_only=True):
    """The parameters that all requests share."""

    model: str
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def settings(self) -> Settings:
        """Returns the sampling settings."""
        given = {name: value for name in BOUNDS if (value := getattr(self, name, None)) is not None}
        longest = self.longest()
        given |= {} if longest is None else {"max_new_tokens": longest}
        given |= {"stop": [self.stop] if isinstance(self.stop, str) else self.stop} if self.stop else {}
        # As in other servers, a top_k of -1 means all tokens, and a seed is any integer of 64 bits.
        given |= {"top_k": 0} if self.top_k == -1 else {}
        given |= {"seed": self.seed % 2**63} if self.seed is not None and -(2**63) <= self.seed < 0 else {}
        return msgspec.convert(given, Settings)

    def longest(self) -> int | None:
        """Returns the most tokens to write, by the newer of the two names if both are given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def likeliest(self) -> int | None:
        """Returns how many of the likeliest tokens to list for each token; None to list no tokens."""
        return None


class Chat(Sampling, kw_only=True):
    """A request to /v1/chat/completions; `context`, a passage that the last message is about, is our extension."""

    messages: list[ChatMessage]
    n: int | None = None
    context: str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LIKELIEST)] | None = None

    def requests(self, user: str) -> list[ChatRequest]:
        """Returns the requests to the engine."""
        if not self.messages or self.messages[-1].role != "user":
            raise UserError("the last message must be the user's")
        messages = [Message(_role(each), _text(each)) for each in self.messages]
        return [ChatRequest("", self.model, messages, self.settings(), self.context, user, self.likeliest())]

    def likeliest(self) -> int | None:
        """Returns how many of the likeliest tokens to list for each token; None to list no tokens."""
        if self.top_logprobs and not self.logprobs:
            raise unsupported_parameter("top_logprobs", "top_logprobs is supported with logprobs: true only")
        return (self.top_logprobs or 0) if self.logprobs else None


class Completion(Sampling, kw_only=True):
    """A request to /v1/completions; a prompt is a text, token ids, or a list of either."""

    prompt: str | list[str | int | list[int]]
    n: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LIKELIEST)] | Literal[False] | None = None

    def prompts(self) -> list[str | list[int]]:
        """Returns the prompts."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if given and all(isinstance(each, int) for each in given):
            return [given]  # type: ignore[list-item]
        if any(isinstance(each, int) for each in given):
            raise UserError("prompt mixes token ids with others, expected a text, ids, or a list of either")
        return given  # type: ignore[return-value]

    def requests(self, user: str) -> list[CompletionRequest]:
        """Returns the requests to the engine, one for each prompt."""
        settings, likeliest, echo = self.settings(), self.likeliest(), bool(self.echo)
        return [CompletionRequest("", self.model, each, settings, user, likeliest, echo) for each in self.prompts()]

    def settings(self) -> Settings:
        """Returns the sampling settings; for an echo alone, the engine writes one token, which `choice` drops."""
        if self.echo and self.longest() == 0:
            return msgspec.structs.replace(self, max_tokens=1, max_completion_tokens=None).settings()
        return super().settings()

    def likeliest(self) -> int | None:
        """Returns how many of the likeliest tokens to list for each token; None to list no tokens."""
        if self.logprobs is None or self.logprobs is False:
            return 0 if self.echo else None
        return self.logprobs


class QA(Sampling, kw_only=True):
    """A request to /v1/qa."""

    question: str
    context: str | None = None


def variant(request: ChatRequest | CompletionRequest, id: str, number: int) -> ChatRequest | CompletionRequest:
    """Returns the request for the answer of this number, each of which has a seed of its own."""
    settings = request.settings
    settings = msgspec.structs.replace(settings, seed=(settings.seed + number) % 2**63)
    return msgspec.structs.replace(request, id=id, settings=settings)


def choice(index: int, asked: Chat | Completion, prompt: str | list[int] | None, end: Done) -> dict[str, Any]:
    """Returns an answer as one of the choices of the response."""
    found: dict[str, Any] = {"index": index, "finish_reason": FINISH[end.finish], "logprobs": None}
    if isinstance(asked, Chat):
        found["message"] = {"role": "assistant", "content": end.text}
        if asked.likeliest() is not None:
            found["logprobs"] = {"content": [_chat_score(score) for score in end.scored], "refusal": None}
        return found
    scored, text = end.scored, end.text
    if asked.longest() == 0:  # without the one token that the engine writes
        scored, text, found["finish_reason"] = scored[: len(scored) - end.tokens], "", "length"
    if asked.echo:
        read = end.scored[: len(end.scored) - end.tokens]
        text = (prompt if isinstance(prompt, str) else "".join(score.text for score in read)) + text
    if asked.logprobs is not None and asked.logprobs is not False:
        found["logprobs"] = _scores(scored)
    return found | {"text": text}


def _scores(scored: Sequence[TokenScore]) -> dict[str, list[Any]]:
    """Returns the `logprobs` of /v1/completions; offsets count the characters of the tokens' texts."""
    texts = [score.text for score in scored]
    return {
        "tokens": texts,
        "token_logprobs": [score.log_prob for score in scored],
        "top_logprobs": [None if score.log_prob is None else _likeliest(score) for score in scored],
        "text_offset": [0, *itertools.accumulate(map(len, texts))][: len(texts)],
    }


def _likeliest(score: TokenScore) -> dict[str, float]:
    """Returns the likeliest tokens and the token itself; of several with the same text, the likeliest."""
    assert score.log_prob is not None
    return dict(sorted([*score.likeliest, (score.text, score.log_prob)], key=lambda item: item[1]))


def _chat_score(score: TokenScore) -> dict[str, Any]:
    def token(text: str, log_prob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}

    return token(score.text, score.log_prob) | {"top_logprobs": [token(*each) for each in score.likeliest]}


def usage(ends: Sequence[tuple[Done, Reading]], number: int, asked: Sampling) -> dict[str, int]:
    """Returns the tokens read and written; a prompt with several answers counts once."""
    prompt = sum(read.prompt_tokens for _, read in ends[::number])
    written = 0 if asked.longest() == 0 else sum(end.tokens for end, _ in ends)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def _role(message: ChatMessage) -> str:
    if message.role not in ROLES or message.tool_calls:
        role = message.role if message.role not in ROLES else "assistant with tool_calls"
        raise unsupported_parameter("messages", f"a message's role is {role!r}, expected one of {', '.join(ROLES)}")
    return ROLES[message.role]


def _text(message: ChatMessage) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    if other := next((part.type for part in message.content if part.type != "text"), None):
        raise UserError(f"a message has a part of type {other!r}, expected text")
    return "".join(part.text for part in message.content)
