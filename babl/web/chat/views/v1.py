"""The API under /v1: OpenAI's chat and completions, and /v1/qa, which is ours. It takes API keys, never cookies.

Nothing is stored of what is asked here. Decoding is greedy unless the request says otherwise.
"""

import asyncio
import contextlib
import functools
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

import msgspec
from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib.auth.decorators import login_not_required
from django.db import connections
from django.http import HttpRequest, HttpResponseBase, JsonResponse
from django.urls import path, re_path
from django.views.decorators.csrf import csrf_exempt

from babl.errors import UserError
from babl.web.chat import access
from babl.web.chat.endpoint import ApiError, Handler, S, decode, engine_failure, event_stream
from babl.web.chat.hub import hub
from babl.web.chat.openai import (
    FINISH,
    IGNORED,
    MAX_CHOICES,
    NEUTRAL,
    QA,
    Chat,
    Completion,
    Sampling,
    choice,
    unsupported_parameter,
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

ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def endpoint(**handlers: Handler) -> Any:
    """Returns the view of a URL under /v1: the key's owner is `request.user`, errors are OpenAI's JSON."""

    @csrf_exempt
    @login_not_required
    async def view(request: HttpRequest, **arguments: Any) -> HttpResponseBase:
        try:
            request.user = await _authenticate(request)
            handler = handlers.get(request.method or "")
            if handler is None:
                raise ApiError(405, "method", f"{request.method} is not allowed here")
            found = await handler(request, **arguments)
        except (UserError, msgspec.ValidationError, msgspec.DecodeError) as error:
            named = re.search(r" - at `\$\.(\w+)", str(error))
            return error_response(ApiError(400, "invalid", str(error), param=named and named[1]))
        except ApiError as error:
            return error_response(error)
        except EngineError as error:
            return error_response(engine_failure(error.failed))
        return found if isinstance(found, HttpResponseBase) else JsonResponse(found)

    return functools.update_wrapper(view, next(iter(handlers.values())), updated=())


async def _authenticate(request: HttpRequest) -> Any:
    """Returns the owner of the request's API key.

    Raises:
        ApiError: The key is unknown or revoked, or there are too many requests.
    """
    user = await sync_to_async(access.key_owner)(request.headers.get("Authorization", ""))
    if user is None:
        raise no_key()
    if request.method == "POST":
        _check_rate(str(user.pk))
    await sync_to_async(connections.close_all)()  # an answer takes longer than a connection should be kept
    return user


def _check_rate(user: str) -> None:
    """Counts an answer against the user's limit a minute.

    Raises:
        ApiError: The limit is reached.
    """
    if wait := access.questions.wait(user):
        raise ApiError(429, "rate_limit_exceeded", "too many questions in a minute", wait)


def no_key() -> ApiError:
    """Returns the error of a request whose API key is unknown, revoked or missing."""
    return ApiError(401, "invalid_api_key", "the Authorization header has no valid API key")


def error_response(error: ApiError) -> JsonResponse:
    """Returns the error as OpenAI's JSON."""
    return JsonResponse(_error_json(error), status=error.status, headers=error.headers())


def _error_json(error: ApiError) -> dict[str, Any]:
    kind = ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.more.get("param"), "code": error.code}}


def _read_body(request: HttpRequest, kind: type[S]) -> S:
    """Returns the JSON body, validated; nothing of it is logged.

    Raises:
        ApiError: It is too long, or has a parameter that is not supported.
        msgspec.DecodeError: It is not JSON, or not of this type.
    """
    if len(request.body) > settings.PASSAGE_CHARACTERS * 4 + 2**20:
        raise ApiError(413, "too_long", f"the request has {len(request.body)} bytes")
    sent = decode(request.body, dict[str, Any])
    for name in sent.keys() - IGNORED - set(kind.__struct_fields__):
        allowed = NEUTRAL.get(name)
        if allowed is None:
            raise unsupported_parameter(name, f"{name} is not a parameter of this server")
        given = sent[name]
        # 1 and True are equal, but not the same parameter.
        same = any(value == given and isinstance(value, bool) == isinstance(given, bool) for value in allowed)
        if given is not None and not same:
            raise unsupported_parameter(name, f"{name} is not supported, expected {json.dumps(allowed[0])}, or nothing")
    return msgspec.convert({name: sent[name] for name in sent if name in kind.__struct_fields__}, kind)


def _model_json(model: ModelState) -> dict[str, Any]:
    facts = {"family": model.family, "parameters": model.parameters, "context": model.context, "state": model.state}
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "babl", **facts}


async def list_models(request: HttpRequest) -> dict[str, Any]:
    """Returns the models that can answer."""
    usable = [model for model in await hub.engine.models() if model.state != "unusable"]
    return {"object": "list", "data": [_model_json(model) for model in usable]}


async def get_model(request: HttpRequest, name: str) -> dict[str, Any]:
    """Returns one model."""
    return _model_json(await _find_model(name))


async def _find_model(name: str) -> ModelState:
    """Returns the model of this name.

    Raises:
        ApiError: There is no such model.
    """
    found = next((model for model in await hub.engine.models() if model.name == name), None)
    if found is None:
        raise ApiError(404, "model_not_found", f"the model {name!r} does not exist")
    return found


async def chat(request: HttpRequest) -> Any:
    """Answers a `Chat` request: the next turn of a conversation."""
    asked = _read_body(request, Chat)
    return await _respond(asked, asked.requests(str(request.user.pk)), "chat.completion")


async def complete(request: HttpRequest) -> Any:
    """Answers a `Completion` request: the continuation of a text."""
    asked = _read_body(request, Completion)
    return await _respond(asked, asked.requests(str(request.user.pk)), "text_completion")


async def answer(request: HttpRequest) -> Any:
    """Answers a `QA` request: the answer to a question, and where it stands in the context."""
    asked = _read_body(request, QA)
    if asked.stream:
        raise UserError("stream is true, but /v1/qa does not stream")
    await _find_model(asked.model)
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
    """Waits for an answer, and returns its last event and what was read for it; cancels it if the client leaves.

    Raises:
        ApiError: The engine gave no answer.
    """
    read = Reading("", 0)
    async with contextlib.aclosing(events) as open_events:
        async for event in open_events:
            match event:
                case Reading():
                    read = event
                case Failed():
                    raise engine_failure(event)
                case Done():
                    return event, read
    raise ApiError(503, "engine", "the engine gave no answer")


async def _respond(asked: Chat | Completion, requests: Sequence[ChatRequest | CompletionRequest], kind: str) -> Any:
    """Returns the answers, n to each request, as OpenAI's JSON or as a stream of it."""
    await _find_model(asked.model)
    number = 1 if asked.n is None else asked.n
    if not 1 <= len(requests) * number <= MAX_CHOICES:
        many = f"n is {number}, to {len(requests)} prompts; expected 1 to {MAX_CHOICES} answers in all"
        raise ApiError(400, "invalid", many, param="n" if requests else "prompt")
    for _ in range(len(requests) * number - 1):  # the first was counted with the request
        _check_rate(requests[0].user)
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
        raise unsupported_parameter(name, f"{name} asks for {len(every)} answers, but a stream has one")
    if asked.likeliest() is not None:
        name = "echo" if isinstance(asked, Completion) and asked.echo else "logprobs"
        raise unsupported_parameter(name, f"{name} is not supported in a stream; ask without stream")
    events = hub.engine.submit(every[0])
    first = await anext(events)
    if isinstance(first, Failed):
        raise engine_failure(first)
    return event_stream(_stream(first, events, base, asked))


async def _ends(requests: Sequence[ChatRequest | CompletionRequest]) -> list[tuple[Done, Reading]]:
    """Waits for several answers as `_end` does; if one fails, cancels the others.

    Raises:
        ApiError: The engine gave no answer to one.
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
    """Yields the chunks of a streamed answer; cancels it if the client leaves."""
    is_chat = base["object"] == "chat.completion"
    base = base | {"object": "chat.completion.chunk"} if is_chat else base
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage
    more: dict[str, Any] = {"usage": None} if with_usage else {}

    def chunk(text: str | None, finish: str | None = None, role: str | None = None) -> bytes:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        delta = ({"role": role} if role else {}) | ({} if text is None else {"content": text})
        choice |= {"delta": delta} if is_chat else {"text": text or ""}
        return _sse_data(base | {"choices": [choice]} | more)

    read = Reading("", 0)
    async with contextlib.aclosing(_chain(first, events)) as all_events:
        if is_chat:
            yield chunk("", role="assistant")
        async for event in all_events:
            match event:
                case Reading():
                    read = event
                case Delta():
                    yield chunk(event.text)
                case Failed():
                    yield _sse_data(_error_json(engine_failure(event)))
                    return
                case Done():
                    yield chunk(None, FINISH[event.finish])
                    if with_usage:
                        yield _sse_data(base | {"choices": [], "usage": usage([(event, read)], 1, asked)})
    yield b"data: [DONE]\n\n"


async def _chain(first: Event, rest: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    async with contextlib.aclosing(rest) as events:
        yield first
        async for event in events:
            yield event


def _sse_data(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


@csrf_exempt
@login_not_required
async def unknown_url(request: HttpRequest) -> JsonResponse:
    """Answers every other address under /v1 with 404."""
    message = f"{request.method} {request.path}: there is no such address here"
    return error_response(ApiError(404, "unknown_url", message))


urlpatterns = [
    path("v1/models", endpoint(GET=list_models)),
    path("v1/models/<path:name>", endpoint(GET=get_model)),
    path("v1/chat/completions", endpoint(POST=chat)),
    path("v1/completions", endpoint(POST=complete)),
    path("v1/qa", endpoint(POST=answer)),
    re_path(r"^v1(?:/.*)?$", unknown_url),
]
