"""What every response carries, and who gets one."""

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from asgiref.sync import markcoroutinefunction
from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.shortcuts import render
from django.utils.decorators import async_only_middleware
from django.utils.http import url_has_allowed_host_and_scheme

Next = Callable[[HttpRequest], Awaitable[HttpResponseBase]]

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " font-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none';"
    " manifest-src 'self'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


@async_only_middleware
def headers(get_response: Next) -> Next:
    """Every response says that nothing but this server's own files may run or load, and is kept by no cache."""

    async def middleware(request: HttpRequest) -> HttpResponseBase:
        request.get_host()  # refuses a name that is not ours, as of a site that points its own name here
        response = await get_response(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    return middleware


class gate:
    """Only those who are logged in come in, except where a view is marked `login_not_required`."""

    async_capable, sync_capable = True, False

    def __init__(self, get_response: Next):
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request: HttpRequest) -> HttpResponseBase:
        """Returns what the view returns."""
        return await self.get_response(request)

    async def process_view(
        self, request: HttpRequest, view: Callable[..., Any], args: Any, kwargs: Any
    ) -> HttpResponse | None:
        """Returns None to let somebody in, or what they get instead."""
        if not getattr(view, "login_required", True):
            return None
        request.user = await request.auser()
        if request.user.is_authenticated:
            return None
        return unknown(request)


def goal(request: HttpRequest) -> str:
    """Returns where somebody is led who has logged in: to the page they asked for, which is never the login page."""
    if request.path == settings.LOGIN_URL:
        wanted = request.GET.get("next", "/")
    else:
        wanted = request.get_full_path() if request.method == "GET" else "/"
    ours = url_has_allowed_host_and_scheme(wanted, {request.get_host()})
    return wanted if ours and urlsplit(wanted).path != settings.LOGIN_URL else "/"


def unknown(request: HttpRequest, message: str = "", status: int = 401) -> HttpResponse:
    """Returns the page, or the JSON, that asks somebody to log in."""
    if request.path.startswith(("/api/", "/metrics")):
        return JsonResponse({"error": {"code": "login", "message": message or "log in first"}}, status=status)
    context = {"by_link": settings.BABL_AUTH == "local", "message": message, "next": goal(request)}
    return render(request, "chat/login.html", context, status=status)
