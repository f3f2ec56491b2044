"""What views share: one URL with a handler for each method, errors as JSON, and request bodies read and checked."""

import functools
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

import msgspec
from asgiref.sync import sync_to_async
from django.core.exceptions import ObjectDoesNotExist, RequestDataTooBig
from django.db import DatabaseError, DataError, IntegrityError
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.utils.http import content_disposition_header

from babl.errors import UserError
from babl.web.chat.services import Conflict, without_nul
from babl.web.engine.client import EngineError
from babl.web.engine.protocol import Failed

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)
Handler = Callable[..., Awaitable[Any]]
MAX_BODY = 8 * 2**20  # bytes, except of files
log = logging.getLogger("babl.web")


class ApiError(Exception):
    """An error that the client is told: status, code and message; `more` stands beside the error in the JSON."""

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None, **more: Any):
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after, self.more = status, code, message, retry_after, more

    def response(self) -> JsonResponse:
        """Returns the error as JSON."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        error |= {} if self.retry_after is None else {"retry_after": self.retry_after}
        return JsonResponse({"error": error, **self.more}, status=self.status, headers=self.headers())

    def headers(self) -> dict[str, str]:
        """Returns the Retry-After header, where the time is known."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


STATUSES = {"model": 422, "busy": 429, "prompt": 422, "broken": 500, "engine": 503}  # HTTP's, of the engine's failures


def engine_failure(failure: Failed, **more: Any) -> ApiError:
    """Returns the error that tells the client of the engine's failure."""
    return ApiError(STATUSES[failure.code], failure.code, failure.message, failure.retry_after, **more)


def endpoint(**handlers: Handler) -> Callable[..., Awaitable[HttpResponseBase]]:
    """Returns the view of a URL.

    Args:
        **handlers: By method. Each returns a response, JSON data, or a status with JSON data.
    """

    async def view(request: HttpRequest, **arguments: Any) -> HttpResponseBase:
        handler = handlers.get(request.method or "")
        if handler is None:
            return HttpResponse(status=405, headers={"Allow": ", ".join(handlers)})
        try:
            found = await handler(request, **arguments)
        except Exception as error:
            return _api_error(error).response()
        if isinstance(found, HttpResponseBase):
            return found
        status, data = found if isinstance(found, tuple) else (200, found)
        return JsonResponse(data, status=status, safe=False)

    return functools.update_wrapper(view, next(iter(handlers.values())))


def _api_error(error: Exception) -> ApiError:
    """Returns what the client is told of an exception.

    Raises:
        Exception: The exception itself, where it is a bug of ours.
    """
    match error:
        case ApiError():
            return error
        case EngineError():
            return engine_failure(error.failed)
        case ObjectDoesNotExist():
            return ApiError(404, "unknown", "not found")
        case Conflict():
            return ApiError(409, "conflict", str(error))
        case UserError() | msgspec.ValidationError() | msgspec.DecodeError():
            return ApiError(400, "invalid", str(error))
        case RequestDataTooBig():
            return ApiError(413, "too_long", "the request is too long")
        case DataError() | IntegrityError():
            log.error("a value could not be stored (%s)", type(error).__name__)
            return ApiError(400, "invalid", "the request has a value that cannot be stored")
        case DatabaseError():
            log.error("a change could not be stored (%s)", type(error).__name__)
            return ApiError(507, "not_saved", "the server could not store this; is its disk full?")
        case _:
            raise error


async def read(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs a function that reads the database on the request's own thread, and returns its result."""
    return await sync_to_async(function)(*args, **kwargs)


def read_body(request: HttpRequest, kind: type[S]) -> S:
    """Returns the JSON body, validated.

    Raises:
        ApiError: It is too long.
        msgspec.ValidationError: It is not of this type.
    """
    if len(request.body) > MAX_BODY:
        raise ApiError(413, "too_long", f"the request has {len(request.body)} bytes, expected at most {MAX_BODY}")
    return decode(without_nul(request.body) or b"{}", kind)


def decode(data: bytes, kind: type[T]) -> T:
    """Returns decoded JSON.

    Raises:
        msgspec.DecodeError: It is not JSON, or not of this type.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except RecursionError:
        raise msgspec.DecodeError("the JSON is nested too deeply") from None


def parse_id(text: str) -> UUID:
    """Returns an id that stands in a query.

    Raises:
        UserError: It is not a UUID.
    """
    try:
        return UUID(text)
    except ValueError:
        raise UserError(f"{text!r} is not an id") from None


def is_form(request: HttpRequest) -> bool:
    """Returns whether the body is a form with files."""
    return (request.content_type or "").startswith("multipart/form-data")


def uploaded_file(request: HttpRequest) -> tuple[str, bytes]:
    """Returns name and bytes of a file, sent as a form's `file` or as the body (its name is then ?name=).

    Raises:
        UserError: The form has no file.
    """
    if is_form(request):
        file = request.FILES.get("file")
        if file is None:
            raise UserError("the form has no file")
        return str(file.name), file.read()
    return request.GET.get("name", "upload"), request.body


def file_response(data: str | bytes, name: str, content_type: str) -> HttpResponse:
    """Returns a response that the browser stores as a file."""
    headers = {"Content-Disposition": content_disposition_header(True, name) or "attachment"}
    return HttpResponse(data, content_type=content_type, headers=headers)


def event_stream(frames: AsyncIterator[bytes]) -> StreamingHttpResponse:
    """Returns a response of server-sent events, which no cache or proxy may hold back."""
    headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
    return StreamingHttpResponse(frames, content_type="text/event-stream; charset=utf-8", headers=headers)
