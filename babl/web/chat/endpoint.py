"""One URL, a handler for each method, and mistakes that come back as JSON with the right status."""

import functools
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, TypeVar

import msgspec
from asgiref.sync import sync_to_async
from django.core.exceptions import ObjectDoesNotExist, RequestDataTooBig
from django.db import DatabaseError, DataError, IntegrityError
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse

from babl.errors import UserError
from babl.web.chat.services import Conflict, without_nul
from babl.web.engine.client import EngineError
from babl.web.engine.protocol import Failed

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)
Handler = Callable[..., Awaitable[Any]]
MOST_BODY = 8 * 2**20  # bytes, except of files
log = logging.getLogger("babl.web")


class Refusal(Exception):
    """What a request gets instead of what it asked for."""

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None, **more: Any):
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after, self.more = status, code, message, retry_after, more

    def response(self) -> JsonResponse:
        """Returns it as JSON."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        error |= {} if self.retry_after is None else {"retry_after": self.retry_after}
        return JsonResponse({"error": error, **self.more}, status=self.status, headers=self.headers())

    def headers(self) -> dict[str, str]:
        """Returns when to come again, where that is known."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


STATUSES = {"model": 422, "busy": 429, "prompt": 422, "broken": 500, "engine": 503}  # of what the engine says


def refused(failure: Failed, **more: Any) -> Refusal:
    """Returns the refusal that passes on what the engine said."""
    return Refusal(STATUSES[failure.code], failure.code, failure.message, failure.retry_after, **more)


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
            return _refusal(error).response()
        if isinstance(found, HttpResponseBase):
            return found
        status, data = found if isinstance(found, tuple) else (200, found)
        return JsonResponse(data, status=status, safe=False)

    return functools.update_wrapper(view, next(iter(handlers.values())))


def _refusal(error: Exception) -> Refusal:
    """Returns what the client is told of an error.

    Raises:
        Exception: The error, where it is a fault of ours.
    """
    match error:
        case Refusal():
            return error
        case EngineError():
            return refused(error.failed)
        case ObjectDoesNotExist():
            return Refusal(404, "unknown", "there is no such thing")
        case Conflict():
            return Refusal(409, "conflict", str(error))
        case UserError() | msgspec.ValidationError() | msgspec.DecodeError():
            return Refusal(400, "invalid", str(error))
        case RequestDataTooBig():
            return Refusal(413, "too_long", "the request is too long")
        case DataError() | IntegrityError():
            log.error("a value could not be stored (%s)", type(error).__name__)
            return Refusal(400, "invalid", "the request has a value that cannot be stored")
        case DatabaseError():
            log.error("a change could not be stored (%s)", type(error).__name__)
            return Refusal(507, "not_saved", "the server could not store this; is its disk full?")
        case _:
            raise error


def body(request: HttpRequest, kind: type[S]) -> S:
    """Returns what was sent, checked.

    Raises:
        Refusal: It is too long.
        msgspec.ValidationError: It is not what it should be.
    """
    if len(request.body) > MOST_BODY:
        raise Refusal(413, "too_long", f"the request has {len(request.body)} bytes, expected at most {MOST_BODY}")
    return decode(without_nul(request.body) or b"{}", kind)


def decode(data: bytes, kind: type[T]) -> T:
    """Returns what JSON says.

    Raises:
        msgspec.DecodeError: It is no JSON, or not what it should be.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except RecursionError:
        raise msgspec.DecodeError("the JSON is nested too deeply") from None


async def read(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Returns what a function of `selectors` returns, called on the request's own thread."""
    return await sync_to_async(function)(*args, **kwargs)
