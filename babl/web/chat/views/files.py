"""Export and import of conversations, and export of feedback."""

import json
from uuid import UUID

from django.http import HttpRequest, HttpResponse
from django.urls import path

from babl.data.squad import to_squad
from babl.errors import UserError
from babl.web.chat import selectors
from babl.web.chat.corrections import corrections
from babl.web.chat.endpoint import endpoint, file_response, read, uploaded_file
from babl.web.chat.exchange.exporting import export_json, export_markdown
from babl.web.chat.exchange.importing import import_file
from babl.web.chat.hub import hub


async def export_conversation(request: HttpRequest, id: UUID) -> HttpResponse:
    """Returns a conversation as a file: ?format=json|md."""
    shown = await read(selectors.conversation, request.user, id)
    name = shown.title or "conversation"
    if request.GET.get("format") == "md":
        return file_response(await read(export_markdown, shown), f"{name}.md", "text/markdown; charset=utf-8")
    return file_response(await read(export_json, request.user, [shown]), f"{name}.json", "application/json")


async def export_all(request: HttpRequest) -> HttpResponse:
    """Returns all of the user's conversations and passages as a JSON file."""
    return file_response(await read(export_json, request.user), "babl.json", "application/json")


async def import_conversations(request: HttpRequest) -> dict[str, int]:
    """Imports such a file, the body or the `file` of a form, even if the client leaves meanwhile.

    Returns how many were new: {conversations, messages, passages}.
    """
    return await hub.detached(import_file(request.user, uploaded_file(request)[1], hub.spawn))


async def export_feedback(request: HttpRequest) -> HttpResponse:
    """Returns the answers that the user said were right, as a SQuAD file: ?test_share=0.2&part=train|test."""
    share, part = request.GET.get("test_share", "0"), request.GET.get("part", "train")
    if part not in ("train", "test"):
        raise UserError(f"part is {part!r}, expected train or test")
    try:
        number = float(share)
    except ValueError:
        raise UserError(f"test_share is {share!r}, expected a number") from None
    found = await read(lambda: corrections(selectors.judged(request.user), number))
    examples = found.train if part == "train" else found.test
    if not examples:
        raise UserError("no answer about a passage has been judged yet, or none that tells what is right")
    return file_response(
        json.dumps(to_squad(examples), ensure_ascii=False), f"feedback-{part}.json", "application/json"
    )


urlpatterns = [
    path("api/conversations/<uuid:id>/export", endpoint(GET=export_conversation)),
    path("api/export", endpoint(GET=export_all)),
    path("api/import", endpoint(POST=import_conversations)),
    path("api/feedback/export", endpoint(GET=export_feedback)),
]
