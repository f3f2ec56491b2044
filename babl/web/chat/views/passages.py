"""Passages that questions are about."""

from typing import Any
from uuid import UUID

import msgspec
from django.http import HttpRequest, HttpResponse
from django.urls import path

from babl.errors import UserError
from babl.web.chat import selectors, serializers, services
from babl.web.chat.database import write
from babl.web.chat.endpoint import endpoint, is_form, read, read_body, uploaded_file


class NewPassage(msgspec.Struct, forbid_unknown_fields=True):
    """A passage that was pasted."""

    text: str
    title: str = ""


async def list_passages(request: HttpRequest) -> dict[str, Any]:
    """Returns {passages: [passage_json without the text]}."""

    def find() -> list[dict[str, Any]]:
        return [serializers.passage_json(each, text=False) for each in selectors.passages(request.user)]

    return {"passages": await read(find)}


async def create_passage(request: HttpRequest) -> tuple[int, dict[str, Any]]:
    """Stores a `NewPassage`, or the `file` of a form, unless it is there already; returns 201 with its passage_json."""
    if is_form(request):
        title, data = uploaded_file(request)
        try:
            new = NewPassage(data.decode("utf-8-sig"), title[:200])
        except UnicodeDecodeError:
            raise UserError(f"{title}: not a text file in UTF-8") from None
    else:
        new = read_body(request, NewPassage)
    return 201, serializers.passage_json(await write(services.add_passage, request.user, new.text, new.title))


async def get_passage(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """Returns a passage with its text: passage_json."""
    return serializers.passage_json(await read(selectors.passage, request.user, id))


async def delete_passage(request: HttpRequest, id: UUID) -> HttpResponse:
    """Deletes a passage; returns 204, or 409 where a conversation or a question set uses it."""
    await write(services.delete_passage, request.user, id)
    return HttpResponse(status=204)


urlpatterns = [
    path("api/passages", endpoint(GET=list_passages, POST=create_passage)),
    path("api/passages/<uuid:id>", endpoint(GET=get_passage, DELETE=delete_passage)),
]
