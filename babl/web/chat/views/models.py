"""The engine's models, and the status of the server."""

from typing import Any

import msgspec
from django.http import HttpRequest
from django.urls import path

from babl.web.chat.endpoint import endpoint, read_body
from babl.web.chat.hub import hub


class ModelName(msgspec.Struct, forbid_unknown_fields=True):
    """The model to load or unload."""

    model: str


async def list_models(request: HttpRequest) -> dict[str, Any]:
    """Returns {models: [engine.protocol.ModelState]}."""
    return {"models": msgspec.to_builtins(await hub.engine.models())}


async def load_model(request: HttpRequest) -> dict[str, Any]:
    """Loads a model into memory; returns the same as `list_models`."""
    await hub.engine.load(read_body(request, ModelName).model)
    return await list_models(request)


async def unload_model(request: HttpRequest) -> dict[str, Any]:
    """Unloads a model; returns the same as `list_models`."""
    await hub.engine.unload(read_body(request, ModelName).model)
    return await list_models(request)


async def status(request: HttpRequest) -> dict[str, Any]:
    """Returns {saved: whether every answer is stored, engine: engine.protocol.Stats}."""
    return {"saved": hub.saved, "engine": msgspec.structs.asdict(await hub.engine.stats())}


urlpatterns = [
    path("api/models", endpoint(GET=list_models)),
    path("api/models/load", endpoint(POST=load_model)),
    path("api/models/unload", endpoint(POST=unload_model)),
    path("api/status", endpoint(GET=status)),
]
