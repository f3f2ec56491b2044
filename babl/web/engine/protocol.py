"""The messages between the web process and the engine process; neither torch nor Django is imported here.

A frame is a length, four bytes big-endian, and one message in msgpack. A request is answered by events with its id, the
last of them `Done` or `Failed`; a call is answered by one `Reply`.
"""

import struct
from typing import Literal

import msgspec

from babl.errors import UserError

MAX_NEW_TOKENS = 8192  # of one answer: memory for all of them is reserved when it begins
MAX_FRAME = 16 << 20  # bytes
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000  # of each
MIN_TEMPERATURE = 0.001  # above 0: logits divided by less are no longer finite
BOUNDS: dict[str, tuple[float, float]] = {  # of `Settings`, inclusive
    "max_new_tokens": (1, MAX_NEW_TOKENS),
    "temperature": (0, 100),
    "top_k": (0, 2**31 - 1),
    "top_p": (1e-6, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "seed": (0, 2**63 - 1),
}

FinishReason = Literal["eos", "stop", "length", "context", "cancelled"]
FailureCode = Literal["model", "busy", "prompt", "broken", "engine"]
LoadState = Literal["unloaded", "loading", "loaded", "unusable"]


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation; role is "system", "user" or "assistant"."""

    role: str
    content: str


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sampling settings of an answer, by the names of `babl.generation.GenerationConfig`.

    Settings are checked here alone, whether they come from the page, the API or an imported file: values out of
    `BOUNDS` cannot be constructed or decoded, so whatever is stored or sent can be encoded, and read by the engine.

    Attributes:
        max_new_tokens: At most `MAX_NEW_TOKENS`.
        temperature: 0 for greedy decoding.
        top_k: 0 for all.
        top_p: Share of the probability mass.
        min_p: Share of the likeliest token's probability.
        repetition_penalty: 1 for none.
        seed: Of the sampling.
        stop: The answer ends before the first of these.

    Raises:
        UserError: A value is out of bounds; decoding raises `msgspec.ValidationError`, which also names the path.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: list[str] = []

    def __post_init__(self) -> None:
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if not least <= value <= most:  # NaN is not, either
                raise UserError(f"{name} is {value}, expected {least} to {most}")
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise UserError(f"temperature is {self.temperature}, expected 0, or at least {MIN_TEMPERATURE}")
        if len(self.stop) > MAX_STOPS:
            raise UserError(f"stop has {len(self.stop)} strings, expected at most {MAX_STOPS}")
        for length in map(len, self.stop):
            if not 1 <= length <= MAX_STOP_CHARACTERS:
                raise UserError(f"stop has a string of {length} characters, expected 1 to {MAX_STOP_CHARACTERS}")


class ChatRequest(msgspec.Struct, frozen=True, tag="chat"):
    """The next turn of a conversation; the last message is the user's.

    Attributes:
        id: Unique among requests.
        model: A name from `models()`.
        messages: In order.
        settings: Sampling settings.
        context: A passage that the last message is about; the answer is located in it.
        user: Who asks; users take turns in the queue.
        likeliest: See `babl.generation.GenerationConfig`.
    """

    id: str
    model: str
    messages: list[Message]
    settings: Settings = Settings()
    context: str | None = None
    user: str = ""
    likeliest: int | None = None


class CompletionRequest(msgspec.Struct, frozen=True, tag="completion"):
    """A text, or ids, to continue as they are; attributes as in `ChatRequest`.

    Attributes:
        echo: Whether to score the prompt's tokens, too.
    """

    id: str
    model: str
    prompt: str | list[int]
    settings: Settings = Settings()
    user: str = ""
    likeliest: int | None = None
    echo: bool = False


class QARequest(msgspec.Struct, frozen=True, tag="qa"):
    """A question in the prompt format of training, with or without context; attributes as in `ChatRequest`.

    A context too long for the model is read in windows; the likeliest of their answers is the answer.
    """

    id: str
    model: str
    question: str
    context: str | None = None
    settings: Settings = Settings()
    user: str = ""


Request = ChatRequest | CompletionRequest | QARequest


class Queued(msgspec.Struct, frozen=True, tag="queued"):
    """The request is queued after `position` others."""

    id: str
    position: int


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """The request waits for its model to be loaded."""

    id: str
    model: str


class Reading(msgspec.Struct, frozen=True, tag="reading"):
    """The model reads the prompt.

    Attributes:
        id: Of the request.
        prompt_tokens: Read, in all windows together.
        windows: Prompts that the context is read in; 1 if it fits.
        cut_tokens: Sent, but not read: of earlier messages that do not fit, or beyond what the model can see.
    """

    id: str
    prompt_tokens: int
    windows: int = 1
    cut_tokens: int = 0


class Delta(msgspec.Struct, frozen=True, tag="delta"):
    """The next piece of an answer.

    Attributes:
        id: Of the request.
        text: The piece; all of them together are the text of `Done`.
        tokens: Written so far.
    """

    id: str
    text: str
    tokens: int


class TokenScore(msgspec.Struct, frozen=True, array_like=True):
    """A token's score where it stands, as `babl.generation.row.Scored`, with texts for ids.

    Attributes:
        text: Of the token, after the ones before it.
        log_prob: Natural logarithm of its probability; None for the first of a prompt.
        likeliest: Texts and log-probabilities of the likeliest tokens there.
    """

    text: str
    log_prob: float | None
    likeliest: list[tuple[str, float]]


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The answer is complete, or was cancelled.

    Attributes:
        id: Of the request.
        text: The answer; empty if the model says that the question has none.
        finish: Why it ended.
        tokens: Written, including the end token.
        log_prob: Natural logarithm of the probability of the tokens.
        probability: Its exponential.
        span: Code points [start, end) of the answer in the context; None if it does not occur there, or has no context.
        seconds: Since the model began to read.
        weights: The first 12 hex digits of the sha256 of the model's weights.
        tokenizer: Likewise, of its tokenizer.
        scored: Tokens, if requested: the prompt's if it is echoed, then those written.
    """

    id: str
    text: str
    finish: FinishReason
    tokens: int = 0
    log_prob: float = 0.0
    probability: float = 1.0
    span: tuple[int, int] | None = None
    seconds: float = 0.0
    weights: str = ""
    tokenizer: str = ""
    scored: list[TokenScore] = []


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """There is no answer.

    Attributes:
        id: Of the request, or of the call.
        code: "model": it cannot be loaded; "busy": the queue is full; "prompt": the request cannot be answered;
            "broken": the model's logits are not finite; "engine": the process crashed, and is restarted.
        message: One line for the user.
        retry_after: Seconds until there may be room, if it is busy.
    """

    id: str
    code: FailureCode
    message: str
    retry_after: float | None = None


Event = Queued | Loading | Reading | Delta | Done | Failed


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Cancels the request with this id at the next step."""

    id: str


class CountTokens(msgspec.Struct, frozen=True, tag="count"):
    """Asks for the `TokenCount` of a request."""

    id: str
    request: Request


class ListModels(msgspec.Struct, frozen=True, tag="models"):
    """Asks for the models and their states."""

    id: str


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Asks to load a model."""

    id: str
    model: str


class Unload(msgspec.Struct, frozen=True, tag="unload"):
    """Asks to unload a model."""

    id: str
    model: str


class GetStats(msgspec.Struct, frozen=True, tag="stats"):
    """Asks for `Stats`."""

    id: str


class TokenCount(msgspec.Struct, frozen=True, tag="counted"):
    """The tokens that a request would take, by the tokenizer of its model.

    Attributes:
        prompt_tokens: To be read, in all windows together.
        limit: Most tokens of one prompt.
        cut_tokens: Not to be read.
        windows: Prompts that the context would be read in.
    """

    prompt_tokens: int
    limit: int
    cut_tokens: int
    windows: int


class ModelState(msgspec.Struct, frozen=True):
    """A model folder.

    Attributes:
        name: As in requests.
        family: "t5", "llama" or "bloom"; empty if it is unusable.
        parameters: How many.
        bytes: Of its weight files.
        context: Most tokens it can see; None if its architecture has no bound.
        state: Whether it is loaded, or can be.
        memory: Bytes that its weights take, or would take.
        needed: Bytes that must be free to load and use it.
        free: Bytes that are free where it would be loaded.
        reason: Why it is unusable.
    """

    name: str
    family: str = ""
    parameters: int = 0
    bytes: int = 0
    context: int | None = None
    state: LoadState = "unloaded"
    memory: int = 0
    needed: int = 0
    free: int = 0
    reason: str = ""


class ModelStates(msgspec.Struct, frozen=True, tag="states"):
    """All models."""

    models: list[ModelState]


class Stats(msgspec.Struct, frozen=True, tag="figures"):
    """Figures of the engine process.

    Attributes:
        waiting: Requests in the queue.
        running: Requests being answered.
        steps: Of decoding, since the process started.
        rss: Bytes of resident memory.
        pid: Of the process.
    """

    waiting: int
    running: int
    steps: int
    rss: int
    pid: int


class Reply(msgspec.Struct, frozen=True, tag="reply"):
    """The answer to the call with this id."""

    id: str
    result: TokenCount | ModelStates | Stats | Failed


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine process takes requests; its first message."""

    pid: int


ToEngine = ChatRequest | CompletionRequest | QARequest | Cancel | CountTokens | ListModels | Load | Unload | GetStats
FromEngine = Queued | Loading | Reading | Delta | Done | Failed | Reply | Ready

_HEADER = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()


def frame(message: msgspec.Struct) -> bytes:
    """Returns the message as a frame.

    Raises:
        ValueError: It has more than `MAX_FRAME` bytes, or a value that msgpack cannot encode.
    """
    try:
        body = _encoder.encode(message)
    except (OverflowError, TypeError, ValueError) as error:  # such as an integer beyond 64 bits, or half a surrogate
        raise ValueError(f"the message cannot be encoded ({error})") from None
    if len(body) > MAX_FRAME:
        raise ValueError(f"the message has {len(body)} bytes, expected at most {MAX_FRAME}")
    return _HEADER.pack(len(body)) + body


class BadFrame(msgspec.Struct, frozen=True):
    """A complete frame with an id that is not a valid message: only that request or call fails."""

    id: str
    reason: str


class _WithId(msgspec.Struct):
    """The field that all messages of requests and calls have."""

    id: str


class Frames:
    """Decodes messages from bytes that arrive in pieces of any size."""

    def __init__(self, types: object):
        self._decoder: msgspec.msgpack.Decoder = msgspec.msgpack.Decoder(types)  # type: ignore[call-overload]
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list:
        """Returns the messages that are complete now, in order, with a `BadFrame` for an invalid one that has an id.

        Raises:
            ValueError: A frame is too long, or has no id: the other end does not speak this protocol.
        """
        self._bytes += data
        found = []
        while len(self._bytes) >= _HEADER.size:
            (size,) = _HEADER.unpack_from(self._bytes)
            if size > MAX_FRAME:
                raise ValueError(f"a frame of {size} bytes, expected at most {MAX_FRAME}")
            end = _HEADER.size + size
            if len(self._bytes) < end:
                break
            body = bytes(self._bytes[_HEADER.size : end])
            del self._bytes[:end]
            try:
                found.append(self._decoder.decode(body))
            except (ValueError, RecursionError) as error:  # msgspec's errors and UnicodeDecodeError are ValueErrors
                found.append(BadFrame(_id_of(body), str(error)))
        return found


def _id_of(body: bytes) -> str:
    try:
        return msgspec.msgpack.decode(body, type=_WithId).id
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a frame is not a message ({error})") from None
