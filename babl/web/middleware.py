"""Security headers on every response, and the login that most views need."""

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
def security_headers(get_response: Next) -> Next:
    """Adds headers so that nothing but this server's own files may run or load, and no cache keeps a response."""

    async def middleware(request: HttpRequest) -> HttpResponseBase:
        request.get_host()  # refuses a name that is not ours, as of a site that points its own name here
        response = await get_response(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    return middleware


class LoginRequiredMiddleware:
    """Answers 401 unless the user is logged in or the view is marked `login_not_required`."""

    async_capable, sync_capable = True, False

    def __init__(self, get_response: Next):
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request: HttpRequest) -> HttpResponseBase:
        """Passes the request on; `process_view` decides."""
        return await self.get_response(request)

    async def process_view(
        self, request: HttpRequest, view: Callable[..., Any], args: Any, kwargs: Any
    ) -> HttpResponse | None:
        """Returns None to call the view, or the response in its place."""
        if not getattr(view, "login_required", True):
            return None
        request.user = await request.auser()
        if request.user.is_authenticated:
            return None
        return login_response(request)


def next_url(request: HttpRequest) -> str:
    """Returns the URL to go to after the login: the page that was asked for, which is never the login page."""
    if request.path == settings.LOGIN_URL:
        wanted = request.GET.get("next", "/")
    else:
        wanted = request.get_full_path() if request.method == "GET" else "/"
    ours = url_has_allowed_host_and_scheme(wanted, {request.get_host()})
    return wanted if ours and urlsplit(wanted).path != settings.LOGIN_URL else "/"


def login_response(request: HttpRequest, message: str = "", status: int = 401) -> HttpResponse:
    """Returns the login page, or for API requests an error as JSON."""
    if request.path.startswith(("/api/", "/metrics")):
        return JsonResponse({"error": {"code": "login", "message": message or "log in first"}}, status=status)
    context = {"by_link": settings.BABL_AUTH == "local", "message": message, "next": next_url(request)}
    return render(request, "chat/login.html", context, status=status)
