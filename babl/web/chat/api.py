"""/v1, as OpenAI's clients expect it, and /v1/qa, which they do not know. Keys alone let in here, cookies never do.

What is asked here is stored nowhere. Sampling is greedy unless the request says otherwise.
"""

import asyncio
import contextlib
import functools
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
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
from babl.web.chat.openai import (
    FINISH,
    IGNORED,
    MOST_CHOICES,
    NEUTRAL,
    QA,
    Chat,
    Completion,
    Sampling,
    choice,
    unsupported,
    usage,
    variant,
)
from babl.web.engine.client import EngineError
from babl.web.engine.protocol import (
    ChatRequest,
    CompletionRequest,
    Delta,
    Done,
    Event,
    Failed,
    ModelState,
    QARequest,
    Reading,
)

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
log = logging.getLogger("babl.web")


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
            named = re.search(r" - at `\$\.(\w+)", str(error))
            return _error(Refusal(400, "invalid", str(error), param=named and named[1]))
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
    if request.method == "POST":
        _not_too_fast(str(user.pk))
    await sync_to_async(connections.close_all)()  # an answer takes longer than a connection should be kept
    return user


def _not_too_fast(user: str) -> None:
    """Takes one of the answers that the user may ask for in a minute.

    Raises:
        Refusal: There is none left.
    """
    if wait := access.questions.wait(user):
        raise Refusal(429, "rate_limit_exceeded", "too many questions in a minute", wait)


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
            raise unsupported(name, f"{name} is no parameter of this server")
        given = sent[name]
        # 1 and True are equal, but not the same parameter.
        same = any(value == given and isinstance(value, bool) == isinstance(given, bool) for value in allowed)
        if given is not None and not same:
            raise unsupported(name, f"{name} is not supported, expected {json.dumps(allowed[0])}, or nothing")
    return msgspec.convert({name: sent[name] for name in sent if name in kind.__struct_fields__}, kind)


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
    return await _answer(asked, asked.requests(str(request.user.pk)), "chat.completion")


async def complete(request: HttpRequest) -> Any:
    """The continuation of a text."""
    asked = _body(request, Completion)
    return await _answer(asked, asked.requests(str(request.user.pk)), "text_completion")


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


async def _answer(asked: Chat | Completion, requests: Sequence[ChatRequest | CompletionRequest], kind: str) -> Any:
    """Returns the answers in OpenAI's words, n to each request, at once or as a stream."""
    await _known(asked.model)
    number = 1 if asked.n is None else asked.n
    if not 1 <= len(requests) * number <= MOST_CHOICES:
        many = f"n is {number}, to {len(requests)} prompts; expected 1 to {MOST_CHOICES} answers in all"
        raise Refusal(400, "invalid", many, param="n" if requests else "prompt")
    for _ in range(len(requests) * number - 1):  # the first was counted with the request
        _not_too_fast(requests[0].user)
    id = f"{'chatcmpl' if isinstance(asked, Chat) else 'cmpl'}-{uuid4().hex}"
    base = {"id": id, "object": kind, "created": int(time.time()), "model": asked.model}
    every = [variant(each, f"{id}-{k}-{i}", i) for k, each in enumerate(requests) for i in range(number)]
    if not asked.stream:
        ends = await _ends(every)
        prompts = [each.prompt if isinstance(each, CompletionRequest) else None for each in every]
        choices = [choice(i, asked, prompts[i], end) for i, (end, _) in enumerate(ends)]
        return base | {"choices": choices, "usage": usage(ends, number, asked)}
    if len(every) > 1:
        name = "n" if number > 1 else "prompt"
        raise unsupported(name, f"{name} asks for {len(every)} answers, of which a stream has one")
    if asked.likeliest() is not None:
        name = "echo" if isinstance(asked, Completion) and asked.echo else "logprobs"
        raise unsupported(name, f"{name} is not supported in a stream; ask without stream")
    events = hub.engine.submit(every[0])
    first = await anext(events)
    if isinstance(first, Failed):
        raise refused(first)
    frames = _stream(first, events, base, asked)
    headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
    return StreamingHttpResponse(frames, content_type="text/event-stream; charset=utf-8", headers=headers)


async def _ends(requests: Sequence[ChatRequest | CompletionRequest]) -> list[tuple[Done, Reading]]:
    """Returns how each answer ended, and what was read for it; where one fails, the others are cancelled.

    Raises:
        Refusal: The engine gave no answer to one.
    """
    tasks = [asyncio.ensure_future(_end(hub.engine.submit(each))) for each in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


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
                        yield _data(base | {"choices": [], "usage": usage([(event, read)], 1, asked)})
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
