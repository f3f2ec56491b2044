"""OpenAI's words: what its clients send, and what they are told."""

import itertools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from babl.errors import UserError
from babl.web.chat.endpoint import ApiError
from babl.web.engine.protocol import ChatRequest, CompletionRequest, Done, Message, Reading, Settings, TokenScore

# Parameters of OpenAI's that change what is answered and that a request here does not have: only the values, the first
# of them OpenAI's own default, that change nothing are taken.
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
# Those that change nothing about it.
IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")
)
MAX_LIKELIEST = 20  # tokens told beside each
MAX_CHOICES = 32  # answers of one request
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}


def unsupported_parameter(name: str, message: str) -> ApiError:
    """Returns what refuses a parameter by its name."""
    return ApiError(400, "unsupported_parameter", message, param=name)


class Part(msgspec.Struct):
    """A piece of a message; only text is understood."""

    type: str
    text: str = ""


class ChatMessage(msgspec.Struct):
    """A turn of a conversation as OpenAI words it."""

    role: str
    content: str | list[Part] | None = None
    tool_calls: list[Any] | None = None


class StreamOptions(msgspec.Struct):
    """What a stream has besides."""

    include_usage: bool = False


class Sampling(msgspec.Struct, kw_only=True):
    """What all requests have."""

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
        """Returns what the engine is told."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        longest = self.longest()
        given |= {} if longest is None else {"max_new_tokens": longest}
        given |= {"stop": [self.stop] if isinstance(self.stop, str) else self.stop} if self.stop else {}
        # As elsewhere, -1 may stand for all tokens, and a seed be any integer of 64 bits.
        given |= {"top_k": 0} if self.top_k == -1 else {}
        given |= {"seed": self.seed % 2**63} if self.seed is not None and -(2**63) <= self.seed < 0 else {}
        return msgspec.convert(given, Settings)

    def longest(self) -> int | None:
        """Returns the most tokens to write, by the newer of two names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def likeliest(self) -> int | None:
        """Returns how many of the likeliest tokens are told beside each token; None where no token is."""
        return None


class Chat(Sampling, kw_only=True):
    """A request to /v1/chat/completions; `context`, a passage the last message is about, is ours."""

    messages: list[ChatMessage]
    n: int | None = None
    context: str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LIKELIEST)] | None = None

    def requests(self, user: str) -> list[ChatRequest]:
        """Returns what the engine is asked."""
        if not self.messages or self.messages[-1].role != "user":
            raise UserError("messages must end with one of the user")
        messages = [Message(_role(each), _text(each)) for each in self.messages]
        return [ChatRequest("", self.model, messages, self.settings(), self.context, user, self.likeliest())]

    def likeliest(self) -> int | None:
        """Returns how many of the likeliest tokens are told beside each token; None where no token is."""
        if self.top_logprobs and not self.logprobs:
            raise unsupported_parameter("top_logprobs", "top_logprobs is for logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None


class Completion(Sampling, kw_only=True):
    """A request to /v1/completions; a prompt is a text, token ids, or a list of either."""

    prompt: str | list[str | int | list[int]]
    n: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LIKELIEST)] | Literal[False] | None = None

    def prompts(self) -> list[str | list[int]]:
        """Returns each of them."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if given and all(isinstance(each, int) for each in given):
            return [given]  # type: ignore[list-item]
        if any(isinstance(each, int) for each in given):
            raise UserError("prompt mixes token ids with others, expected a text, ids, or a list of either")
        return given  # type: ignore[return-value]

    def requests(self, user: str) -> list[CompletionRequest]:
        """Returns what the engine is asked, a request for each prompt."""
        settings, likeliest, echo = self.settings(), self.likeliest(), bool(self.echo)
        return [CompletionRequest("", self.model, each, settings, user, likeliest, echo) for each in self.prompts()]

    def settings(self) -> Settings:
        """Returns what the engine is told; an echo may be asked for alone, of which it writes one token too many."""
        if self.echo and self.longest() == 0:
            return msgspec.structs.replace(self, max_tokens=1, max_completion_tokens=None).settings()
        return super().settings()

    def likeliest(self) -> int | None:
        """Returns how many of the likeliest tokens are told beside each token; None where no token is."""
        if self.logprobs is None or self.logprobs is False:
            return 0 if self.echo else None
        return self.logprobs


class QA(Sampling, kw_only=True):
    """A request to /v1/qa."""

    question: str
    context: str | None = None


def variant(request: ChatRequest | CompletionRequest, id: str, number: int) -> ChatRequest | CompletionRequest:
    """Returns the request for one of its answers, each of which draws by a seed of its own."""
    settings = request.settings
    settings = msgspec.structs.replace(settings, seed=(settings.seed + number) % 2**63)
    return msgspec.structs.replace(request, id=id, settings=settings)


def choice(index: int, asked: Chat | Completion, prompt: str | list[int] | None, end: Done) -> dict[str, Any]:
    """Returns one of the answers, to the prompt where there is one."""
    found: dict[str, Any] = {"index": index, "finish_reason": FINISH[end.finish], "logprobs": None}
    if isinstance(asked, Chat):
        found["message"] = {"role": "assistant", "content": end.text}
        if asked.likeliest() is not None:
            found["logprobs"] = {"content": [_chat_score(score) for score in end.scored], "refusal": None}
        return found
    scored, text = end.scored, end.text
    if asked.longest() == 0:  # the one token that the engine writes all the same
        scored, text, found["finish_reason"] = scored[: len(scored) - end.tokens], "", "length"
    if asked.echo:
        read = end.scored[: len(end.scored) - end.tokens]
        text = (prompt if isinstance(prompt, str) else "".join(score.text for score in read)) + text
    if asked.logprobs is not None and asked.logprobs is not False:
        found["logprobs"] = _scores(scored)
    return found | {"text": text}


def _scores(scored: Sequence[TokenScore]) -> dict[str, list[Any]]:
    """Returns the tokens in the words of /v1/completions; the offsets count the tokens' own texts."""
    texts = [score.text for score in scored]
    return {
        "tokens": texts,
        "token_logprobs": [score.log_prob for score in scored],
        "top_logprobs": [None if score.log_prob is None else _likeliest(score) for score in scored],
        "text_offset": [0, *itertools.accumulate(map(len, texts))][: len(texts)],
    }


def _likeliest(score: TokenScore) -> dict[str, float]:
    """Returns the likeliest tokens, and the token itself; of several of one text, the likeliest."""
    assert score.log_prob is not None
    return dict(sorted([*score.likeliest, (score.text, score.log_prob)], key=lambda item: item[1]))


def _chat_score(score: TokenScore) -> dict[str, Any]:
    def told(text: str, log_prob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}

    return told(score.text, score.log_prob) | {"top_logprobs": [told(*each) for each in score.likeliest]}


def usage(ends: Sequence[tuple[Done, Reading]], number: int, asked: Sampling) -> dict[str, int]:
    """Returns the tokens read and written, of several answers to one prompt the prompt's once."""
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
