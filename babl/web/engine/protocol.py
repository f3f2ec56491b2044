"""What the web process and the engine process say to each other; neither torch nor Django is imported here.

A frame is its length, four bytes big-endian, and one message in msgpack. A request is answered by events that carry
its id, the last of them `Done` or `Failed`; a call is answered by one `Reply`.
"""

import struct
from typing import Literal

import msgspec

from babl.errors import UserError

MOST_NEW_TOKENS = 8192  # of one answer: room for all of them is reserved when it begins
MOST_FRAME = 16 << 20  # bytes
MOST_STOPS = 16
MOST_STOP = 1000  # characters of one
LEAST_TEMPERATURE = 0.001  # of those above 0: logits divided by less are no longer finite
BOUNDS: dict[str, tuple[float, float]] = {  # of `Settings`, both included
    "max_new_tokens": (1, MOST_NEW_TOKENS),
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
    """How an answer is chosen, as in `babl.generation.GenerationConfig`.

    The one place where settings are checked, whether they come from the page, the API or an imported file: what is out
    of `BOUNDS` cannot be made or decoded, so whatever is stored or sent can be encoded and read by the engine.

    Attributes:
        max_new_tokens: At most `MOST_NEW_TOKENS`.
        temperature: 0 takes the likeliest token.
        top_k: 0 for all.
        top_p: Of the probability mass.
        min_p: Share of the likeliest token's probability.
        repetition_penalty: 1 for none.
        seed: Of what is drawn.
        stop: The answer ends before the first of these.

    Raises:
        UserError: A value is out of bounds; decoding raises `msgspec.ValidationError`, which also tells where.
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
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise UserError(f"temperature is {self.temperature}, expected 0, or at least {LEAST_TEMPERATURE}")
        if len(self.stop) > MOST_STOPS:
            raise UserError(f"stop has {len(self.stop)} strings, expected at most {MOST_STOPS}")
        for length in map(len, self.stop):
            if not 1 <= length <= MOST_STOP:
                raise UserError(f"stop has a string of {length} characters, expected 1 to {MOST_STOP}")


class ChatRequest(msgspec.Struct, frozen=True, tag="chat"):
    """The next turn of a conversation; the last message is the user's.

    Attributes:
        id: Unique among requests.
        model: A name from `models()`.
        messages: In order.
        settings: Of the answer.
        context: A passage the last message is about; the answer is located in it.
        user: Whose turn it is in the queue; users take turns.
        likeliest: As in `babl.generation.GenerationConfig`.
    """

    id: str
    model: str
    messages: list[Message]
    settings: Settings = Settings()
    context: str | None = None
    user: str = ""
    likeliest: int | None = None


class CompletionRequest(msgspec.Struct, frozen=True, tag="completion"):
    """A text to continue, or ids, read as they are; attributes as of `ChatRequest`.

    Attributes:
        echo: Whether the prompt's tokens are scored, too.
    """

    id: str
    model: str
    prompt: str | list[int]
    settings: Settings = Settings()
    user: str = ""
    likeliest: int | None = None
    echo: bool = False


class QARequest(msgspec.Struct, frozen=True, tag="qa"):
    """A question in the words of training, with its context or without; attributes as of `ChatRequest`.

    A context too long for the model is read through windows; the likeliest of their answers is the answer.
    """

    id: str
    model: str
    question: str
    context: str | None = None
    settings: Settings = Settings()
    user: str = ""


Request = ChatRequest | CompletionRequest | QARequest


class Queued(msgspec.Struct, frozen=True, tag="queued"):
    """The request waits; `position` others are before it."""

    id: str
    position: int


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """The request waits for its model to be read into memory."""

    id: str
    model: str


class Reading(msgspec.Struct, frozen=True, tag="reading"):
    """The model reads the prompt.

    Attributes:
        id: Of the request.
        prompt_tokens: Read, in all windows together.
        windows: Prompts the context is read through; 1 where it fits.
        cut_tokens: Of what was sent and is not read: earlier messages without room, or that the model has no place for.
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
    """A token and what the model thought of it where it stands, as `babl.generation.row.Scored`, in text.

    Attributes:
        text: Of the token, after those before it.
        log_prob: Natural logarithm of its probability; None for the first of a prompt.
        likeliest: Texts of the likeliest tokens there, and theirs.
    """

    text: str
    log_prob: float | None
    likeliest: list[tuple[str, float]]


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The answer is whole, or was stopped.

    Attributes:
        id: Of the request.
        text: The answer; empty where a model says that a question has none.
        finish: Why it ended.
        tokens: Written, the end token included.
        log_prob: Natural logarithm of the probability of the tokens.
        probability: Its exponential.
        span: Code points [start, end) of the answer in the context; None where it is nowhere in it, or there is none.
        seconds: From the moment the model began to read.
        weights: The first 12 hex digits of the sha256 of the model's weights.
        tokenizer: Likewise, of its tokenizer.
        scored: Tokens, where that was asked for: the prompt's if they are echoed, then those written.
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
        code: "model": it cannot be loaded; "busy": the queue is full; "prompt": what was sent cannot be answered;
            "broken": the model's logits are no numbers; "engine": the process broke down, and is started again.
        message: One line for the user.
        retry_after: Seconds until there may be room, where it is busy.
    """

    id: str
    code: FailureCode
    message: str
    retry_after: float | None = None


Event = Queued | Loading | Reading | Delta | Done | Failed


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """The request with this id ends at the next step, wherever it is."""

    id: str


class Count(msgspec.Struct, frozen=True, tag="count"):
    """Asks for `Counted` of a request that is not sent yet."""

    id: str
    request: Request


class ListModels(msgspec.Struct, frozen=True, tag="models"):
    """Asks for the models and their states."""

    id: str


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Asks for the model in memory."""

    id: str
    model: str


class Unload(msgspec.Struct, frozen=True, tag="unload"):
    """Asks for the model out of memory."""

    id: str
    model: str


class GetStats(msgspec.Struct, frozen=True, tag="stats"):
    """Asks for `Stats`."""

    id: str


class Counted(msgspec.Struct, frozen=True, tag="counted"):
    """What a request would take, by the tokenizer of its model.

    Attributes:
        prompt_tokens: That would be read, in all windows together.
        limit: Most tokens of one prompt.
        cut_tokens: That would not be read.
        windows: Prompts the context would be read through.
    """

    prompt_tokens: int
    limit: int
    cut_tokens: int
    windows: int


class ModelState(msgspec.Struct, frozen=True):
    """A model folder.

    Attributes:
        name: What requests call it.
        family: "t5", "llama" or "bloom"; empty where it is unusable.
        parameters: How many.
        bytes: Of its weight files.
        context: Most tokens it can see; None where its architecture has no bound.
        state: Whether it is in memory, and whether it can be.
        memory: Bytes its weights take, or would take.
        needed: Bytes that must be free to load it and to talk to it.
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
    """How the engine process is.

    Attributes:
        waiting: Requests in the queue.
        running: Requests being answered.
        steps: Of decoders, since the process began.
        rss: Bytes of memory the process has.
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
    result: Counted | ModelStates | Stats | Failed


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine process takes requests; its first word."""

    pid: int


ToEngine = ChatRequest | CompletionRequest | QARequest | Cancel | Count | ListModels | Load | Unload | GetStats
FromEngine = Queued | Loading | Reading | Delta | Done | Failed | Reply | Ready

_HEADER = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()


def frame(message: msgspec.Struct) -> bytes:
    """Returns the message with its length before it.

    Raises:
        ValueError: It has more than `MOST_FRAME` bytes, or a value that msgpack has no form for.
    """
    try:
        body = _encoder.encode(message)
    except (OverflowError, TypeError, ValueError) as error:  # such as an integer beyond 64 bits, or half a surrogate
        raise ValueError(f"the message cannot be encoded ({error})") from None
    if len(body) > MOST_FRAME:
        raise ValueError(f"the message has {len(body)} bytes, expected at most {MOST_FRAME}")
    return _HEADER.pack(len(body)) + body


class Unreadable(msgspec.Struct, frozen=True):
    """Stands for a frame that is whole and says whose it is, but is no message: only that request or call fails."""

    id: str
    reason: str


class _Named(msgspec.Struct):
    """What all messages of requests and calls have."""

    id: str


class Frames:
    """Messages out of bytes that come in pieces of any size."""

    def __init__(self, types: object):
        self._decoder: msgspec.msgpack.Decoder = msgspec.msgpack.Decoder(types)  # type: ignore[call-overload]
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list:
        """Returns the messages that are whole now, in order; `Unreadable` for one that is none but has an id.

        Raises:
            ValueError: A frame is too long, or has no id; the other end does not speak this protocol.
        """
        self._bytes += data
        found = []
        while len(self._bytes) >= _HEADER.size:
            (size,) = _HEADER.unpack_from(self._bytes)
            if size > MOST_FRAME:
                raise ValueError(f"a frame of {size} bytes, expected at most {MOST_FRAME}")
            end = _HEADER.size + size
            if len(self._bytes) < end:
                break
            body = bytes(self._bytes[_HEADER.size : end])
            del self._bytes[:end]
            try:
                found.append(self._decoder.decode(body))
            except (ValueError, RecursionError) as error:  # msgspec's and UnicodeDecodeError are ValueErrors
                found.append(Unreadable(_id_of(body), str(error)))
        return found


def _id_of(body: bytes) -> str:
    try:
        return msgspec.msgpack.decode(body, type=_Named).id
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a frame is not a message ({error})") from None
