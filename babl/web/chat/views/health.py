"""For those who run the server: readiness, and figures for Prometheus."""

import logging

from asgiref.sync import sync_to_async
from django.contrib.auth.decorators import login_not_required
from django.db import DatabaseError, connection
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from babl.web.chat import access
from babl.web.chat.hub import hub
from babl.web.chat.views import v1
from babl.web.engine.client import EngineError

log = logging.getLogger("babl.web")


@login_not_required
async def ready(request: HttpRequest) -> JsonResponse:
    """Returns 200 if the database can be reached, everything is saved and the engine answers; else 503."""

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
    """Returns figures for Prometheus, to users who are logged in and to bearers of an API key."""
    user = await request.auser()
    bearer = request.headers.get("Authorization", "")
    if not user.is_authenticated and await sync_to_async(access.key_owner)(bearer) is None:
        return v1.error_response(v1.no_key())
    return HttpResponse(generate_latest(), content_type=CONTENT_TYPE_LATEST)


urlpatterns = [
    path("readyz", ready),
    path("metrics", metrics),
]
