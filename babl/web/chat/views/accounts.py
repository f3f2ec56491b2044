"""Logging in and out, and API keys."""

from typing import Any
from uuid import UUID

import msgspec
from django.conf import settings
from django.contrib.auth import authenticate, login, logout
from django.contrib.auth.decorators import login_not_required
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.urls import path

from babl.web.chat import access, accounts, selectors
from babl.web.chat.database import write
from babl.web.chat.endpoint import ApiError, endpoint, read, read_body
from babl.web.chat.models import ApiKey
from babl.web.middleware import login_response, next_url


@login_not_required
async def login_page(request: HttpRequest) -> HttpResponse:
    """Logs a user in, by the one-time link or by name and password."""
    if request.method == "GET" and (await request.auser()).is_authenticated:
        return HttpResponseRedirect(next_url(request))
    if settings.BABL_AUTH == "local":
        if not access.link.use(request.GET.get("token", "")):
            return await read(login_response, request, "that link was used" if "token" in request.GET else "")
        print(f"The link was used. For another browser: {access.link}", flush=True)
        await read(login, request, await write(accounts.local_user), "django.contrib.auth.backends.ModelBackend")
        return HttpResponseRedirect(next_url(request))
    if request.method != "POST":
        return await read(login_response, request, "", 200)
    name = request.POST.get("username", "")
    if wait := access.wait_to_log_in(name, request.META.get("REMOTE_ADDR", "")):
        response = await read(login_response, request, "too many attempts; wait a minute", 429)
        response.headers["Retry-After"] = str(max(1, round(wait)))
        return response
    user = await read(authenticate, request, username=name, password=request.POST.get("password", ""))
    if user is None:
        return await read(login_response, request, "the name or the password is wrong", 401)
    await read(login, request, user)
    return HttpResponseRedirect(next_url(request))


async def log_out(request: HttpRequest) -> HttpResponse:
    """Ends the session."""
    await read(logout, request)
    return HttpResponseRedirect("/login/")


def csrf_failed(request: HttpRequest, reason: str = "") -> JsonResponse:
    """Answers a request without the CSRF token."""
    return ApiError(403, "csrf", f"the request does not prove that it comes from our page ({reason})").response()


class NewKey(msgspec.Struct, forbid_unknown_fields=True):
    """An API key to create."""

    name: str


async def list_keys(request: HttpRequest) -> dict[str, Any]:
    """Returns {keys: [{id, name, prefix, created}]}."""
    return {"keys": await read(lambda: [_key_json(each) for each in selectors.api_keys(request.user)])}


async def create_key(request: HttpRequest) -> tuple[int, dict[str, Any]]:
    """Creates a key; returns 201 with {id, name, prefix, created, key}, the only response that has the key itself."""
    row, key = await write(accounts.create_api_key, request.user, read_body(request, NewKey).name)
    return 201, _key_json(row) | {"key": key}


async def revoke_key(request: HttpRequest, id: UUID) -> HttpResponse:
    """Revokes a key; returns 204."""
    await write(accounts.revoke_api_key, request.user, id)
    return HttpResponse(status=204)


def _key_json(row: ApiKey) -> dict[str, str]:
    return {"id": str(row.id), "name": row.name, "prefix": row.prefix, "created": row.created.isoformat()}


urlpatterns = [
    path("login/", endpoint(GET=login_page, POST=login_page)),
    path("logout/", endpoint(POST=log_out)),
    path("api/keys", endpoint(GET=list_keys, POST=create_key)),
    path("api/keys/<uuid:id>", endpoint(DELETE=revoke_key)),
]
