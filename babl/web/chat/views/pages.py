"""The pages of the app."""

from typing import Any
from uuid import UUID

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import path

from babl.web.chat import selectors, serializers
from babl.web.chat.endpoint import endpoint, read


async def chat_page(request: HttpRequest, id: UUID | None = None) -> HttpResponse:
    """Renders the chat, with a conversation or without one."""

    def page() -> HttpResponse:
        context: dict[str, Any] = {
            "conversations": selectors.conversations(request.user),
            "conversation": None,
            "messages": [],
            "more": False,
        }
        if id is not None:
            context["conversation"] = serializers.conversation_json(selectors.conversation(request.user, id))
            context |= selectors.thread(request.user, id)
        return render(request, "chat/index.html", context)

    return await read(page)


async def sets_page(request: HttpRequest) -> HttpResponse:
    """Renders the question sets and their runs."""

    def page() -> HttpResponse:
        sets = [serializers.set_json(each) for each in selectors.question_sets(request.user)]
        return render(request, "chat/sets.html", {"sets": sets})

    return await read(page)


async def settings_page(request: HttpRequest) -> HttpResponse:
    """Renders API keys, export and import."""
    return await read(render, request, "chat/settings.html", {"keys": selectors.api_keys(request.user)})


urlpatterns = [
    path("", endpoint(GET=chat_page)),
    path("c/<uuid:id>/", endpoint(GET=chat_page)),
    path("sets/", endpoint(GET=sets_page)),
    path("settings/", endpoint(GET=settings_page)),
]
