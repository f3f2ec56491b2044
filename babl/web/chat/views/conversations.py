"""Conversations: the list and its search, and what may be changed of them."""

from datetime import datetime
from typing import Any
from uuid import UUID

from django.http import HttpRequest, HttpResponse
from django.urls import path

from babl.errors import UserError
from babl.web.chat import selectors, serializers, services
from babl.web.chat.database import write
from babl.web.chat.endpoint import endpoint, read, read_body
from babl.web.chat.hub import hub
from babl.web.chat.search import search
from babl.web.chat.services import ConversationUpdate


class NewConversation(ConversationUpdate, forbid_unknown_fields=True):
    """A conversation to create: its first settings, and the id that the client gives it."""

    id: UUID | None = None


async def list_conversations(request: HttpRequest) -> dict[str, Any]:
    """Returns a page of the list, or what a search finds.

    ?kind=active|archived|trash&before=CURSOR -> {conversations: [conversation_json], next: CURSOR or null}
    ?q=WORDS -> {conversations: [conversation_json + {message, excerpt}], next: null}
    """
    if query := request.GET.get("q"):
        return {"conversations": await read(search, request.user, query), "next": None}
    kind = request.GET.get("kind", "active")
    if kind not in ("active", "archived", "trash"):
        raise UserError(f"kind is {kind!r}, expected active, archived or trash")
    before = _parse_cursor(request.GET["before"]) if "before" in request.GET else None
    found = await read(selectors.conversations, request.user, kind, before)
    more = f"{found[-1].updated.isoformat()}~{found[-1].id}" if len(found) == selectors.CONVERSATIONS_PER_PAGE else None
    return {"conversations": [serializers.conversation_json(each) for each in found], "next": more}


def _parse_cursor(text: str) -> tuple[datetime, UUID]:
    try:
        updated, id = text.split("~")
        return datetime.fromisoformat(updated), UUID(id)
    except ValueError:
        raise UserError(f"before is {text!r}, expected what `next` said") from None


async def create_conversation(request: HttpRequest) -> tuple[int, dict[str, Any]]:
    """Creates a conversation from a `NewConversation`; returns 201 with its conversation_json."""
    new = read_body(request, NewConversation)
    given = {name: getattr(new, name) for name in ConversationUpdate.__struct_fields__}
    update = ConversationUpdate(**given)
    return 201, serializers.conversation_json(await write(services.create_conversation, request.user, new.id, update))


async def get_conversation(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """Returns conversation_json + {messages: [message_json], more, live: [ids of answers being written]}."""

    def find() -> dict[str, Any]:
        found = serializers.conversation_json(selectors.conversation(request.user, id))
        thread = selectors.thread(request.user, id)
        live = [m["id"] for m in thread["messages"] if m.get("status") in ("queued", "running")]
        live += [c["id"] for m in thread["messages"] for c in m["columns"] if c["status"] in ("queued", "running")]
        return found | thread | {"live": list(dict.fromkeys(live))}

    return await read(find)


async def update_conversation(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """Changes what a `ConversationUpdate` names (also archives, trashes and restores); returns conversation_json."""
    update = read_body(request, ConversationUpdate)
    return serializers.conversation_json(await write(services.update_conversation, request.user, id, update))


async def delete_conversation(request: HttpRequest, id: UUID) -> HttpResponse:
    """Deletes a conversation that is in the trash, for good; returns 204."""
    for answer in await write(services.purge_conversation, request.user, id):
        await hub.stop(answer)
    return HttpResponse(status=204)


urlpatterns = [
    path("api/conversations", endpoint(GET=list_conversations, POST=create_conversation)),
    path(
        "api/conversations/<uuid:id>",
        endpoint(GET=get_conversation, PATCH=update_conversation, DELETE=delete_conversation),
    ),
]
