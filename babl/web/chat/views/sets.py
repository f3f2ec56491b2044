"""Question sets and the runs of models through them."""

import json
from typing import Any
from uuid import UUID

import msgspec
from django.http import HttpRequest, HttpResponse
from django.urls import path

from babl.web.chat import question_sets, runs, selectors, serializers
from babl.web.chat.database import write
from babl.web.chat.endpoint import endpoint, file_response, parse_id, read, read_body, uploaded_file


async def list_sets(request: HttpRequest) -> dict[str, Any]:
    """Returns {sets: [set_json]}."""

    def find() -> list[dict[str, Any]]:
        return [serializers.set_json(each) for each in selectors.question_sets(request.user)]

    return {"sets": await read(find)}


async def create_set(request: HttpRequest) -> tuple[int, dict[str, Any]]:
    """Imports a SQuAD file, the body (?name=NAME) or the `file` of a form; returns 201 with its set_json."""
    name, data = uploaded_file(request)
    new = await write(question_sets.import_question_set, request.user, name, data)
    return 201, await read(serializers.set_json, new)


async def get_set(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """Returns a question set with its runs: set_json."""
    return await read(lambda: serializers.set_json(selectors.question_set(request.user, id)))


async def delete_set(request: HttpRequest, id: UUID) -> HttpResponse:
    """Stops the runs of a question set and deletes it; returns 204."""
    for run in await read(lambda: list(selectors.question_set(request.user, id).runs.all())):
        await runs.stop(run.id)
    await write(question_sets.delete_question_set, request.user, id)
    return HttpResponse(status=204)


class NewRun(msgspec.Struct, forbid_unknown_fields=True):
    """A run to start: which model answers, and whether it is shown the passages."""

    model: str
    with_context: bool = True


async def start_run(request: HttpRequest, id: UUID) -> tuple[int, dict[str, Any]]:
    """Starts a `NewRun` through a question set; returns 201 with its run_json."""
    new = read_body(request, NewRun)
    run = await runs.start(question_sets.create_run, request.user, id, new.model, new.with_context)
    return 201, await read(serializers.run_json, run)


async def get_run(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """Returns a run and its scores so far: run_json."""
    return await read(lambda: serializers.run_json(selectors.run(request.user, id)))


async def get_predictions(request: HttpRequest, id: UUID) -> HttpResponse:
    """Returns a run's {question id: answer} as a file, which `babl score` and `babl compare` read."""

    def find() -> tuple[str, dict[str, str]]:
        run = selectors.run(request.user, id)
        name = f"{run.model.replace('/', '-')}-{'with' if run.with_context else 'without'}.json"
        return name, selectors.predictions(run)

    name, found = await read(find)
    return file_response(json.dumps(found, indent=1, ensure_ascii=False) + "\n", name, "application/json")


async def stop_run(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """Stops a run, which keeps its answers; returns its run_json."""
    await read(selectors.run, request.user, id)
    await runs.stop(id)
    return await get_run(request, id)


async def resume_run(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """Resumes a run with the questions that have no answer yet; returns its run_json."""
    await runs.start(question_sets.resume_run, request.user, id)
    return await get_run(request, id)


async def compare_runs(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """Returns, question by question, what two runs answered: ?a=RUN&b=RUN.

    {questions: [{qid, question, passage, golds, a, b, exact, f1}], fixed, broke}: `fixed` and `broke` count the
    questions that b alone and a alone answers exactly.
    """
    a, b = (parse_id(request.GET.get(name, "")) for name in "ab")
    await read(selectors.question_set, request.user, id)
    rows = await read(selectors.difference, request.user, a, b)
    fixed, broke = (sum(row["exact"] * sign > 0 for row in rows) for sign in (1, -1))
    return {"questions": rows, "fixed": fixed, "broke": broke}


urlpatterns = [
    path("api/sets", endpoint(GET=list_sets, POST=create_set)),
    path("api/sets/<uuid:id>", endpoint(GET=get_set, DELETE=delete_set)),
    path("api/sets/<uuid:id>/runs", endpoint(POST=start_run)),
    path("api/sets/<uuid:id>/difference", endpoint(GET=compare_runs)),
    path("api/runs/<uuid:id>", endpoint(GET=get_run)),
    path("api/runs/<uuid:id>/predictions", endpoint(GET=get_predictions)),
    path("api/runs/<uuid:id>/stop", endpoint(POST=stop_run)),
    path("api/runs/<uuid:id>/resume", endpoint(POST=resume_run)),
]
