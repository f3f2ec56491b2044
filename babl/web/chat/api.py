"""/v1, as OpenAI's clients expect it, and /v1/qa, which they do not know. Keys alone let in here, cookies never do.

What is asked here is stored nowhere. Sampling is greedy unless the request says otherwise.
"""

import contextlib
import functools
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any
from uuid import uuid4

import msgspec
from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib.auth.decorators import login_not_required
from django.db import DatabaseError, connection, connections
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.views.decorators.csrf import csrf_exempt
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from babl.errors import UserError
from babl.web.chat import access
from babl.web.chat.endpoint import Handler, Refusal, S, decode, refused
from babl.web.chat.hub import hub
from babl.web.engine.client import EngineError
from babl.web.engine.protocol import (
    ChatRequest,
    CompletionRequest,
    Delta,
    Done,
    Event,
    Failed,
    Message,
    ModelState,
    QARequest,
    Reading,
    Request,
    Settings,
)

# Parameters of OpenAI's that change what is answered and that this server does not have: only the values, the first of
# them OpenAI's own default, that change nothing are taken.
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
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
log = logging.getLogger("babl.web")


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
        longest = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        given |= {} if longest is None else {"max_new_tokens": longest}
        given |= {"stop": [self.stop] if isinstance(self.stop, str) else self.stop} if self.stop else {}
        # As elsewhere, -1 may stand for all tokens, and a seed be any integer of 64 bits.
        given |= {"top_k": 0} if self.top_k == -1 else {}
        given |= {"seed": self.seed % 2**63} if self.seed is not None and -(2**63) <= self.seed < 0 else {}
        return msgspec.convert(given, Settings)


class Chat(Sampling, kw_only=True):
    """A request to /v1/chat/completions; `context`, a passage the last message is about, is ours."""

    messages: list[ChatMessage]
    context: str | None = None


class Completion(Sampling, kw_only=True):
    """A request to /v1/completions."""

    prompt: str | list[str]


class QA(Sampling, kw_only=True):
    """A request to /v1/qa."""

    question: str
    context: str | None = None


def endpoint(**handlers: Handler) -> Any:
    """Returns the view of a URL under /v1: the key's owner is `request.user`, mistakes are OpenAI's JSON."""

    @csrf_exempt
    @login_not_required
    async def view(request: HttpRequest, **arguments: Any) -> HttpResponseBase:
        try:
            request.user = await _owner(request)
            handler = handlers.get(request.method or "")
            if handler is None:
                raise Refusal(405, "method", f"{request.method} is not possible here")
            found = await handler(request, **arguments)
        except (UserError, msgspec.ValidationError, msgspec.DecodeError) as error:
            return _error(Refusal(400, "invalid", str(error)))
        except Refusal as error:
            return _error(error)
        except EngineError as error:
            return _error(refused(error.failed))
        return found if isinstance(found, HttpResponseBase) else JsonResponse(found)

    return functools.update_wrapper(view, next(iter(handlers.values())), updated=())


async def _owner(request: HttpRequest) -> Any:
    """Returns whose key the request bears.

    Raises:
        Refusal: There is none in force, or it asks too often.
    """
    user = await sync_to_async(access.key_owner)(request.headers.get("Authorization", ""))
    if user is None:
        raise Refusal(401, "invalid_api_key", "the Authorization header has no key that is in force")
    if request.method == "POST" and (wait := access.questions.wait(str(user.pk))):
        raise Refusal(429, "rate_limit_exceeded", "too many questions in a minute", wait)
    await sync_to_async(connections.close_all)()  # an answer takes longer than a connection should be kept
    return user


def _error_json(refusal: Refusal) -> dict[str, Any]:
    kind = KINDS.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    return {
        "error": {"message": refusal.message, "type": kind, "param": refusal.more.get("param"), "code": refusal.code}
    }


def _error(refusal: Refusal) -> JsonResponse:
    return JsonResponse(_error_json(refusal), status=refusal.status, headers=refusal.headers())


def _body(request: HttpRequest, kind: type[S]) -> S:
    """Returns what was sent, and logs nothing of it.

    Raises:
        Refusal: It is too long, or has a parameter that this server does not have.
        msgspec.DecodeError: It is not what it should be.
    """
    if len(request.body) > settings.PASSAGE_CHARACTERS * 4 + 2**20:
        raise Refusal(413, "too_long", f"the request has {len(request.body)} bytes")
    sent = decode(request.body, dict[str, Any])
    for name in sent.keys() - IGNORED - set(kind.__struct_fields__):
        allowed = NEUTRAL.get(name)
        if allowed is None:
            raise _unsupported(name, f"{name} is no parameter of this server")
        given = sent[name]
        # 1 and True are equal, but not the same parameter.
        same = any(value == given and isinstance(value, bool) == isinstance(given, bool) for value in allowed)
        if given is not None and not same:
            raise _unsupported(name, f"{name} is not supported, expected {json.dumps(allowed[0])}, or nothing")
    return msgspec.convert({name: sent[name] for name in sent if name in kind.__struct_fields__}, kind)


def _unsupported(name: str, message: str) -> Refusal:
    return Refusal(400, "unsupported_parameter", message, param=name)


async def _models() -> list[ModelState]:
    return await hub.engine.models()


def _model_json(model: ModelState) -> dict[str, Any]:
    facts = {"family": model.family, "parameters": model.parameters, "context": model.context, "state": model.state}
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "babl", **facts}


async def list_models(request: HttpRequest) -> dict[str, Any]:
    """The models that can be asked."""
    usable = [model for model in await _models() if model.state != "unusable"]
    return {"object": "list", "data": [_model_json(model) for model in usable]}


async def get_model(request: HttpRequest, name: str) -> dict[str, Any]:
    """One of them."""
    return _model_json(await _known(name))


async def _known(name: str) -> ModelState:
    """Returns the model of that name.

    Raises:
        Refusal: There is none.
    """
    found = next((model for model in await _models() if model.name == name), None)
    if found is None:
        raise Refusal(404, "model_not_found", f"the model {name!r} does not exist")
    return found


async def chat(request: HttpRequest) -> Any:
    """The next turn of a conversation."""
    asked = _body(request, Chat)
    if not asked.messages or asked.messages[-1].role != "user":
        raise UserError("messages must end with one of the user")
    messages = [Message(_role(each), _text(each)) for each in asked.messages]
    engine_request = ChatRequest(
        f"chatcmpl-{uuid4().hex}", asked.model, messages, asked.settings(), asked.context, str(request.user.pk)
    )
    return await _answer(engine_request, asked, "chat.completion")


def _role(message: ChatMessage) -> str:
    if message.role not in ROLES or message.tool_calls:
        role = message.role if message.role not in ROLES else "assistant with tool_calls"
        raise _unsupported("messages", f"a message's role is {role!r}, expected one of {', '.join(ROLES)}")
    return ROLES[message.role]


def _text(message: ChatMessage) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    if other := next((part.type for part in message.content if part.type != "text"), None):
        raise UserError(f"a message has a part of type {other!r}, expected text")
    return "".join(part.text for part in message.content)


async def complete(request: HttpRequest) -> Any:
    """The continuation of a text."""
    asked = _body(request, Completion)
    prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
    if len(prompts) != 1:
        raise UserError(f"prompt has {len(prompts)} texts, expected one")
    engine_request = CompletionRequest(
        f"cmpl-{uuid4().hex}", asked.model, prompts[0], asked.settings(), str(request.user.pk)
    )
    return await _answer(engine_request, asked, "text_completion")


async def answer(request: HttpRequest) -> Any:
    """The answer to a question, and where it stands in the context."""
    asked = _body(request, QA)
    if asked.stream:
        raise UserError("stream is true, but /v1/qa does not stream")
    await _known(asked.model)
    engine_request = QARequest(
        f"qa-{uuid4().hex}", asked.model, asked.question, asked.context, asked.settings(), str(request.user.pk)
    )
    end, read = await _end(hub.engine.submit(engine_request))
    start, stop = end.span or (None, None)
    return {
        "answer": end.text,
        "start": start,
        "end": stop,
        "in_context": end.span is not None if asked.context is not None and end.text else None,
        "probability": end.probability,
        "log_prob": end.log_prob,
        "prompt_tokens": read.prompt_tokens,
        "cut_tokens": read.cut_tokens,
        "windows": read.windows,
        "finish": end.finish,
        "model": asked.model,
        "weights": end.weights,
        "tokenizer": end.tokenizer,
    }


async def _end(events: AsyncGenerator[Event, None]) -> tuple[Done, Reading]:
    """Returns how an answer ended, and what was read for it; it is cancelled where the client leaves.

    Raises:
        Refusal: The engine gave none.
    """
    read = Reading("", 0)
    async with contextlib.aclosing(events) as open_events:
        async for event in open_events:
            match event:
                case Reading():
                    read = event
                case Failed():
                    raise refused(event)
                case Done():
                    return event, read
    raise Refusal(503, "engine", "the engine gave no answer")


async def _answer(engine_request: Request, asked: Sampling, kind: str) -> Any:
    """Returns the answer in OpenAI's words, at once or as a stream."""
    await _known(asked.model)
    events = hub.engine.submit(engine_request)
    base = {"id": engine_request.id, "object": kind, "created": int(time.time()), "model": asked.model}
    if not asked.stream:
        end, read = await _end(events)
        choice: dict[str, Any] = {"index": 0, "finish_reason": FINISH[end.finish], "logprobs": None}
        is_chat = isinstance(engine_request, ChatRequest)
        choice |= {"message": {"role": "assistant", "content": end.text}} if is_chat else {"text": end.text}
        return base | {"choices": [choice], "usage": _usage(read, end)}
    first = await anext(events)
    if isinstance(first, Failed):
        raise refused(first)
    frames = _stream(first, events, base, asked)
    headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
    return StreamingHttpResponse(frames, content_type="text/event-stream; charset=utf-8", headers=headers)


def _usage(read: Reading, end: Done) -> dict[str, int]:
    total = read.prompt_tokens + end.tokens
    return {"prompt_tokens": read.prompt_tokens, "completion_tokens": end.tokens, "total_tokens": total}


async def _stream(
    first: Event, events: AsyncGenerator[Event, None], base: dict[str, Any], asked: Sampling
) -> AsyncIterator[bytes]:
    """Yields chunks; where the client leaves, the request is cancelled."""
    is_chat = base["object"] == "chat.completion"
    base = base | {"object": "chat.completion.chunk"} if is_chat else base
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage
    more: dict[str, Any] = {"usage": None} if with_usage else {}

    def chunk(text: str | None, finish: str | None = None, role: str | None = None) -> bytes:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        delta = ({"role": role} if role else {}) | ({} if text is None else {"content": text})
        choice |= {"delta": delta} if is_chat else {"text": text or ""}
        return _data(base | {"choices": [choice]} | more)

    read = Reading("", 0)
    async with contextlib.aclosing(_from(first, events)) as all_events:
        if is_chat:
            yield chunk("", role="assistant")
        async for event in all_events:
            match event:
                case Reading():
                    read = event
                case Delta():
                    yield chunk(event.text)
                case Failed():
                    yield _data(_error_json(refused(event)))
                    return
                case Done():
                    yield chunk(None, FINISH[event.finish])
                    if with_usage:
                        yield _data(base | {"choices": [], "usage": _usage(read, event)})
    yield b"data: [DONE]\n\n"


async def _from(first: Event, rest: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    async with contextlib.aclosing(rest) as events:
        yield first
        async for event in events:
            yield event


def _data(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


@csrf_exempt
@login_not_required
async def nowhere(request: HttpRequest) -> JsonResponse:
    """What every other address under /v1 says."""
    return _error(Refusal(404, "unknown_url", f"{request.method} {request.path}: there is no such address here"))


# For those who run the server


@login_not_required
async def ready(request: HttpRequest) -> JsonResponse:
    """200 where the database can be reached, everything is saved and the engine answers; else 503."""

    def database() -> bool:
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
            return True
        except DatabaseError:
            return False

    facts = {"database": await sync_to_async(database)(), "saved": hub.saved, "open": hub.is_open, "engine": False}
    try:
        await hub.engine.stats()
        facts["engine"] = True
    except EngineError as error:
        log.warning("the engine does not answer (%s)", error)
    return JsonResponse(facts, status=200 if all(facts.values()) else 503)


@login_not_required
async def metrics(request: HttpRequest) -> HttpResponse:
    """Figures for Prometheus, to those who bear a key or are logged in."""
    user = await request.auser()
    if (
        not user.is_authenticated
        and await sync_to_async(access.key_owner)(request.headers.get("Authorization", "")) is None
    ):
        return _error(Refusal(401, "invalid_api_key", "the Authorization header has no key that is in force"))
    return HttpResponse(generate_latest(), content_type=CONTENT_TYPE_LATEST)
