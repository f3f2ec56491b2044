"""Questions and answers: asking, following the answers as they are written, stopping them, and feedback."""

from typing import Any
from urllib.parse import urlencode
from uuid import UUID

import msgspec
from django.db import connections
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path

from babl.errors import UserError
from babl.web.chat import access, selectors, serializers, services, sse
from babl.web.chat.database import write
from babl.web.chat.endpoint import ApiError, endpoint, engine_failure, event_stream, parse_id, read, read_body
from babl.web.chat.engine_requests import Draft, draft_request
from babl.web.chat.hub import RunningAnswer, hub

MAX_STREAM_ANSWERS = 128  # those of all tabs of a browser, which share one stream


async def list_messages(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """Returns the page above a message: ?before=MESSAGE_ID -> {messages: [message_json], more}."""
    before = parse_id(request.GET["before"]) if "before" in request.GET else None
    return await read(selectors.thread, request.user, id, before)


async def ask(request: HttpRequest, id: UUID) -> tuple[int, dict[str, Any]]:
    """Stores a `services.NewQuestion` and starts its answers.

    Returns 201 (200 where the question was there already) with {question: message_json, answers: [message_json],
    stream: URL}. A 429 because the engine is full has these, too: the question is kept, and `ask_again` asks it anew.
    """
    question = read_body(request, services.NewQuestion)
    _check_rate(request)
    return await _started(request, *await hub.ask(services.ask, request.user, id, question))


async def ask_again(request: HttpRequest, id: UUID) -> tuple[int, dict[str, Any]]:
    """Starts another answer to the question of this one, as a `services.AskAgain` says; returns the same as `ask`."""
    again = read_body(request, services.AskAgain)
    _check_rate(request)
    return await _started(request, *await hub.ask(services.ask_again, request.user, id, again))


def _check_rate(request: HttpRequest) -> None:
    if not hub.is_open:
        raise ApiError(503, "engine", "the server is shutting down", 5)
    if wait := access.questions.wait(str(request.user.pk)):
        raise ApiError(429, "rate", "too many questions in a minute; the question was not sent", wait)


async def _started(
    request: HttpRequest, asked: services.Asked, running: list[RunningAnswer]
) -> tuple[int, dict[str, Any]]:
    """Returns what the client needs to follow the answers.

    Raises:
        ApiError: The engine is full; the question and its answers are kept.
    """
    failed = await hub.busy_failure(running)
    ids = [("g", str(answer.id)) for answer in asked.answers]
    found = {
        "question": await read(serializers.message_json, asked.question),
        "answers": [await read(_message_json, request.user, answer.id) for answer in asked.answers],
        "stream": f"/api/events?{urlencode(ids)}",
    }
    if failed:
        raise engine_failure(failed, **found)
    return 201 if asked.requests else 200, found


def _message_json(user: Any, id: UUID) -> dict[str, Any]:
    return serializers.message_json(selectors.message(user, id))


async def stop(request: HttpRequest, id: UUID) -> dict[str, bool]:
    """Stops an answer; returns {stopped: whether it was being written}."""
    await read(selectors.generation, request.user, id)
    return {"stopped": await hub.stop(str(id))}


async def give_feedback(request: HttpRequest, id: UUID) -> dict[str, Any] | None:
    """Stores the user's `services.NewFeedback` on an answer; returns {good, span, no_answer, note}."""
    feedback = read_body(request, services.NewFeedback)
    return serializers.feedback_json(await write(services.give_feedback, request.user, id, feedback))


async def delete_feedback(request: HttpRequest, id: UUID) -> HttpResponse:
    """Deletes the user's feedback on an answer; returns 204."""
    await write(services.delete_feedback, request.user, id)
    return HttpResponse(status=204)


async def events(request: HttpRequest) -> StreamingHttpResponse:
    """Streams answers as they are written, as `sse` describes: ?g=ID&g=ID; Last-Event-ID or ?after= resumes."""
    ids = [parse_id(each) for each in request.GET.getlist("g")]
    if not 1 <= len(ids) <= MAX_STREAM_ANSWERS:
        raise UserError(f"{len(ids)} answers asked for, expected 1 to {MAX_STREAM_ANSWERS}")
    user = request.user
    for id in ids:
        await read(selectors.generation, user, id)
    await read(connections.close_all)  # the stream lasts longer than a connection should be kept
    seen = request.headers.get("Last-Event-ID") or request.GET.get("after", "")
    return event_stream(sse.answers(user, ids, sse.parse_cursors(seen, len(ids))))


async def count_tokens(request: HttpRequest) -> dict[str, Any]:
    """Returns what a `Draft` would take of its model: {prompt_tokens, limit, cut_tokens, windows}."""
    engine_request = await read(draft_request, request.user, read_body(request, Draft))
    return msgspec.structs.asdict(await hub.engine.count(engine_request))


urlpatterns = [
    path("api/conversations/<uuid:id>/messages", endpoint(GET=list_messages, POST=ask)),
    path("api/messages/<uuid:id>/again", endpoint(POST=ask_again)),
    path("api/messages/<uuid:id>/stop", endpoint(POST=stop)),
    path("api/messages/<uuid:id>/feedback", endpoint(PUT=give_feedback, DELETE=delete_feedback)),
    path("api/events", endpoint(GET=events)),
    path("api/count", endpoint(POST=count_tokens)),
]
