"""Pages, and the JSON behind them. No view writes: `services` do, through `database.write`.

Requests that change something carry the header X-CSRFToken (pages have it in `<meta name="csrf-token">`). Errors are
`{"error": {"code", "message", "retry_after"?}}` with status 400 (invalid), 401 (log in), 404 (unknown, or another's),
409 (conflict), 413 (too long), 422 (the engine refuses), 429 (wait; Retry-After), 500 (the model is broken), 503 (no
engine), 507 (not saved).
Shapes: CONVERSATION is `selectors.conversation_json`, MESSAGE `message_json`, PASSAGE `passage_json`, SET `set_json`,
RUN `run_json`. Ids are UUIDs. Clients may make their own for conversations (`id`) and must for questions (`client_id`):
a request sent twice changes nothing.

Pages
  GET  /                        chat/index.html: conversations, conversation None, messages []
  GET  /c/<id>/                 chat/index.html: conversations, conversation CONVERSATION, messages [MESSAGE], more
  GET  /sets/ /settings/        chat/sets.html: sets [SET]; chat/settings.html: keys
  GET POST /login/  POST /logout/

Conversations
  GET    /api/conversations?kind=active|archived|trash&before=CURSOR   {conversations: [CONVERSATION], next: CURSOR?}
  GET    /api/conversations?q=WORDS      {conversations: [CONVERSATION + {message, excerpt}], next: null}
  POST   /api/conversations              ConversationChange + {id?} -> 201 CONVERSATION
  GET    /api/conversations/<id>         CONVERSATION + {messages: [MESSAGE], more, live: [message id]}
  PATCH  /api/conversations/<id>         services.ConversationChange -> CONVERSATION
  DELETE /api/conversations/<id>         gone for good, if it is in the trash -> 204
  GET    /api/conversations/<id>/messages?before=MESSAGE_ID            {messages: [MESSAGE], more}
  GET    /api/conversations/<id>/export?format=json|md                 a file
  GET    /api/export                     everything, as a JSON file
  POST   /api/import                     such a file as the body -> {conversations, messages, passages}: new ones

Questions and answers
  POST   /api/conversations/<id>/messages   services.Ask -> 201 (200 if it was there) {question: MESSAGE, answers:
                                            [MESSAGE], stream: URL}; 429 has these too: the question is kept, and
                                            `again` asks it once more
  POST   /api/messages/<id>/again           services.Again -> 201 {question, answers: [MESSAGE], stream}
  POST   /api/messages/<id>/stop            -> {stopped: bool}
  PUT    /api/messages/<id>/feedback        services.Judgement -> {good, span, no_answer, note};  DELETE -> 204
  GET    /api/events?g=ID&g=ID              server-sent events, see `sse`; Last-Event-ID or &after= goes on
  POST   /api/count                         Draft -> {prompt_tokens, limit, cut_tokens, windows}

Passages
  GET    /api/passages                      {passages: [PASSAGE without text]}
  POST   /api/passages                      {text, title?} as JSON, or multipart with `file` -> 201 PASSAGE
  GET    /api/passages/<id>                 PASSAGE
  DELETE /api/passages/<id>                 -> 204; 409 where anything is about it

Models
  GET    /api/models                        {models: [engine.protocol.ModelState]}
  POST   /api/models/load, /api/models/unload    {model} -> {models}
  GET    /api/status                        {saved, engine: engine.protocol.Stats}

Question sets
  GET    /api/sets                          {sets: [SET]}
  POST   /api/sets?name=NAME                a SQuAD file as the body, or multipart with `file` -> 201 SET
  GET DELETE /api/sets/<id>                 SET / 204
  POST   /api/sets/<id>/runs                {model, with_context?} -> 201 RUN
  GET    /api/sets/<id>/difference?a=RUN&b=RUN   {questions: [{qid, question, golds, a, b, exact, f1}], fixed, broke}
  GET    /api/runs/<id>                     RUN
  GET    /api/runs/<id>/predictions         {question id: answer}, which `babl score` and `babl compare` read
  POST   /api/runs/<id>/stop, /api/runs/<id>/resume   -> RUN
  GET    /api/feedback/export?test_share=0.2&part=train|test            a SQuAD file

Keys of the API
  GET    /api/keys                          {keys: [{id, name, prefix, created}]}
  POST   /api/keys                          {name} -> 201 the same + {key}, which is shown once
  DELETE /api/keys/<id>                     revoked -> 204
"""

import json
from datetime import datetime
from typing import Any, Literal
from urllib.parse import urlencode
from uuid import UUID

import msgspec
from django.conf import settings
from django.contrib.auth import authenticate, login, logout
from django.contrib.auth.decorators import login_not_required
from django.db import connections
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse, StreamingHttpResponse
from django.shortcuts import render
from django.utils.http import content_disposition_header

from babl.data.squad import to_squad
from babl.errors import UserError
from babl.web.chat import access, exchange, selectors, services, squad_io, sse
from babl.web.chat.database import write
from babl.web.chat.endpoint import Refusal, body, read, refused
from babl.web.chat.hub import Running, hub
from babl.web.engine.protocol import Settings
from babl.web.middleware import goal, unknown

STREAM = 128  # answers in one stream: those of all tabs of a browser, which share it


class NewConversation(services.ConversationChange, forbid_unknown_fields=True):
    """A conversation's first settings, and the id the client gives it."""

    id: UUID | None = None


class Draft(msgspec.Struct, forbid_unknown_fields=True):
    """A question that is not sent yet."""

    content: str
    model: str
    conversation: UUID | None = None
    parent: UUID | None = None
    passage: UUID | None = None
    kind: Literal["chat", "qa", "completion"] = "qa"
    settings: Settings = Settings()


class NewPassage(msgspec.Struct, forbid_unknown_fields=True):
    """A passage that was pasted."""

    text: str
    title: str = ""


class OneModel(msgspec.Struct, forbid_unknown_fields=True):
    """Names a model."""

    model: str


class NewRun(msgspec.Struct, forbid_unknown_fields=True):
    """Who is to answer a question set, and whether the passages are shown."""

    model: str
    with_context: bool = True


class NewKey(msgspec.Struct, forbid_unknown_fields=True):
    """What a key is called."""

    name: str


# Pages


async def index(request: HttpRequest, id: UUID | None = None) -> Any:
    """The chat, with or without a conversation."""

    def page() -> HttpResponse:
        context: dict[str, Any] = {
            "conversations": selectors.conversations(request.user),
            "messages": [],
            "more": False,
        }
        context["conversation"] = None
        if id is not None:
            context["conversation"] = selectors.conversation_json(selectors.conversation(request.user, id))
            context |= selectors.thread(request.user, id)
        return render(request, "chat/index.html", context)

    return await read(page)


async def sets_page(request: HttpRequest) -> Any:
    """Question sets and their runs."""

    def page() -> HttpResponse:
        sets = [selectors.set_json(each) for each in selectors.question_sets(request.user)]
        return render(request, "chat/sets.html", {"sets": sets})

    return await read(page)


async def settings_page(request: HttpRequest) -> Any:
    """API keys, export and import."""
    return await read(render, request, "chat/settings.html", {"keys": selectors.api_keys(request.user)})


@login_not_required
async def login_page(request: HttpRequest) -> HttpResponse:
    """Lets somebody in: by the one-time link, or by name and password."""
    if request.method == "GET" and (await request.auser()).is_authenticated:
        return HttpResponseRedirect(goal(request))
    if settings.BABL_AUTH == "local":
        if not access.link.use(request.GET.get("token", "")):
            return await read(unknown, request, "that link was used" if "token" in request.GET else "")
        print(f"The link was used. For another browser: {access.link}", flush=True)
        await read(login, request, await write(services.local_user), "django.contrib.auth.backends.ModelBackend")
        return HttpResponseRedirect(goal(request))
    if request.method != "POST":
        return await read(unknown, request, "", 200)
    name = request.POST.get("username", "")
    if wait := access.wait_to_log_in(name, request.META.get("REMOTE_ADDR", "")):
        response = await read(unknown, request, "too many attempts; wait a minute", 429)
        response.headers["Retry-After"] = str(max(1, round(wait)))
        return response
    user = await read(authenticate, request, username=name, password=request.POST.get("password", ""))
    if user is None:
        return await read(unknown, request, "the name or the password is wrong", 401)
    await read(login, request, user)
    return HttpResponseRedirect(goal(request))


async def logout_page(request: HttpRequest) -> HttpResponse:
    """The session ends."""
    await read(logout, request)
    return HttpResponseRedirect("/login/")


def csrf_failed(request: HttpRequest, reason: str = "") -> JsonResponse:
    """What a request without the token gets."""
    return Refusal(403, "csrf", f"the request does not prove that it comes from our page ({reason})").response()


# Conversations


async def list_conversations(request: HttpRequest) -> dict[str, Any]:
    """A page of the list, or what a search finds."""
    if query := request.GET.get("q"):
        return {"conversations": await read(selectors.search, request.user, query), "next": None}
    kind = request.GET.get("kind", "active")
    if kind not in ("active", "archived", "trash"):
        raise UserError(f"kind is {kind!r}, expected active, archived or trash")
    before = _list_cursor(request.GET["before"]) if "before" in request.GET else None
    found = await read(selectors.conversations, request.user, kind, before)
    more = f"{found[-1].updated.isoformat()}~{found[-1].id}" if len(found) == selectors.LIST else None
    return {"conversations": [selectors.conversation_json(each) for each in found], "next": more}


def _list_cursor(text: str) -> tuple[datetime, UUID]:
    try:
        updated, id = text.split("~")
        return datetime.fromisoformat(updated), UUID(id)
    except ValueError:
        raise UserError(f"before is {text!r}, expected what `next` said") from None


async def create_conversation(request: HttpRequest) -> tuple[int, dict[str, Any]]:
    """A new conversation."""
    new = body(request, NewConversation)
    given = {name: getattr(new, name) for name in services.ConversationChange.__struct_fields__}
    change = services.ConversationChange(**given)
    return 201, selectors.conversation_json(await write(services.create_conversation, request.user, new.id, change))


async def get_conversation(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """A conversation as it is shown."""

    def find() -> dict[str, Any]:
        found = selectors.conversation_json(selectors.conversation(request.user, id))
        thread = selectors.thread(request.user, id)
        live = [m["id"] for m in thread["messages"] if m.get("status") in ("queued", "running")]
        live += [c["id"] for m in thread["messages"] for c in m["columns"] if c["status"] in ("queued", "running")]
        return found | thread | {"live": list(dict.fromkeys(live))}

    return await read(find)


async def change_conversation(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """The conversation is renamed, archived, thrown away or taken back, set up, or shows another branch."""
    change = body(request, services.ConversationChange)
    return selectors.conversation_json(await write(services.change_conversation, request.user, id, change))


async def purge_conversation(request: HttpRequest, id: UUID) -> HttpResponse:
    """The conversation is gone for good."""
    for answer in await write(services.purge_conversation, request.user, id):
        await hub.stop(answer)
    return HttpResponse(status=204)


async def list_messages(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """The page above a message."""
    before = _uuid(request.GET["before"]) if "before" in request.GET else None
    return await read(selectors.thread, request.user, id, before)


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise UserError(f"{text!r} is no id") from None


async def export_conversation(request: HttpRequest, id: UUID) -> HttpResponse:
    """The conversation as a file."""
    shown = await read(selectors.conversation, request.user, id)
    name = shown.title or "conversation"
    if request.GET.get("format") == "md":
        return _file(await read(exchange.markdown, shown), f"{name}.md", "text/markdown; charset=utf-8")
    return _file(await read(exchange.export, request.user, [shown]), f"{name}.json", "application/json")


async def export_all(request: HttpRequest) -> HttpResponse:
    """Everything as a file."""
    return _file(await read(exchange.export, request.user), "babl.json", "application/json")


def _file(data: str | bytes, name: str, kind: str) -> HttpResponse:
    headers = {"Content-Disposition": content_disposition_header(True, name) or "attachment"}
    return HttpResponse(data, content_type=kind, headers=headers)


async def import_file(request: HttpRequest) -> dict[str, int]:
    """What a file has is there, even where the client has left meanwhile."""
    return await hub.lasting(exchange.import_(request.user, _upload(request)[1], hub.spawn))


def _upload(request: HttpRequest) -> tuple[str, bytes]:
    """Returns name and bytes of a file, sent as a form's `file` or as the body."""
    if (request.content_type or "").startswith("multipart/form-data"):
        file = request.FILES.get("file")
        if file is None:
            raise UserError("the form has no file")
        return str(file.name), file.read()
    return request.GET.get("name", "upload"), request.body


# Questions and answers


async def ask(request: HttpRequest, id: UUID) -> tuple[int, dict[str, Any]]:
    """The question is stored, and its answers are on their way."""
    question = body(request, services.Ask)
    _not_too_fast(request)
    return await _begun(request, *await hub.ask(services.ask, request.user, id, question))


async def ask_again(request: HttpRequest, id: UUID) -> tuple[int, dict[str, Any]]:
    """Another answer is on its way."""
    again = body(request, services.Again)
    _not_too_fast(request)
    return await _begun(request, *await hub.ask(services.ask_again, request.user, id, again))


def _not_too_fast(request: HttpRequest) -> None:
    if not hub.is_open:
        raise Refusal(503, "engine", "the server is about to end", 5)
    if wait := access.questions.wait(str(request.user.pk)):
        raise Refusal(429, "rate", "too many questions in a minute; the question was not sent", wait)


async def _begun(request: HttpRequest, asked: services.Asked, running: list[Running]) -> tuple[int, dict[str, Any]]:
    """Returns what the client needs to follow the answers.

    Raises:
        Refusal: The engine is full; all this is kept.
    """
    refusal = await hub.refusal(running)
    ids = [("g", str(answer.id)) for answer in asked.answers]
    found = {
        "question": await read(selectors.message_json, asked.question),
        "answers": [await read(_message_json, request.user, answer.id) for answer in asked.answers],
        "stream": f"/api/events?{urlencode(ids)}",
    }
    if refusal:
        raise refused(refusal, **found)
    return 201 if asked.requests else 200, found


def _message_json(user: Any, id: UUID) -> dict[str, Any]:
    return selectors.message_json(selectors.message(user, id))


async def stop(request: HttpRequest, id: UUID) -> dict[str, bool]:
    """The answer ends."""
    await read(selectors.generation, request.user, id)
    return {"stopped": await hub.stop(str(id))}


async def judge(request: HttpRequest, id: UUID) -> dict[str, Any] | None:
    """What the user thinks of an answer is stored."""
    return selectors.feedback_json(await write(services.judge, request.user, id, body(request, services.Judgement)))


async def forget_judgement(request: HttpRequest, id: UUID) -> HttpResponse:
    """The user takes it back."""
    await write(services.forget_judgement, request.user, id)
    return HttpResponse(status=204)


async def events(request: HttpRequest) -> StreamingHttpResponse:
    """Answers as they are written."""
    ids = [_uuid(each) for each in request.GET.getlist("g")]
    if not 1 <= len(ids) <= STREAM:
        raise UserError(f"{len(ids)} answers asked for, expected 1 to {STREAM}")
    user = request.user
    for id in ids:
        await read(selectors.generation, user, id)
    await read(connections.close_all)  # the stream lasts longer than a connection should be kept
    seen = request.headers.get("Last-Event-ID") or request.GET.get("after", "")
    frames = sse.answers(user, ids, sse.parse_cursors(seen, len(ids)))
    headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
    return StreamingHttpResponse(frames, content_type="text/event-stream; charset=utf-8", headers=headers)


async def count(request: HttpRequest) -> Any:
    """What a question would take, before it is sent."""
    draft = body(request, Draft)
    engine_request = await read(
        selectors.draft_request,
        request.user,
        draft.conversation,
        draft.parent,
        draft.kind,
        draft.model,
        draft.content,
        draft.passage,
        draft.settings,
    )
    return msgspec.structs.asdict(await hub.engine.count(engine_request))


# Passages


async def list_passages(request: HttpRequest) -> dict[str, Any]:
    """The user's passages."""

    def find() -> list[dict[str, Any]]:
        return [selectors.passage_json(each, text=False) for each in selectors.passages(request.user)]

    return {"passages": await read(find)}


async def add_passage(request: HttpRequest) -> tuple[int, dict[str, Any]]:
    """A passage is stored, once."""
    if (request.content_type or "").startswith("multipart/form-data"):
        title, data = _upload(request)
        try:
            new = NewPassage(data.decode("utf-8-sig"), title[:200])
        except UnicodeDecodeError:
            raise UserError(f"{title}: not a text file in UTF-8") from None
    else:
        new = body(request, NewPassage)
    return 201, selectors.passage_json(await write(services.add_passage, request.user, new.text, new.title))


async def get_passage(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """A passage with its text."""
    return selectors.passage_json(await read(selectors.passage, request.user, id))


async def delete_passage(request: HttpRequest, id: UUID) -> HttpResponse:
    """The passage is gone."""
    await write(services.delete_passage, request.user, id)
    return HttpResponse(status=204)


# Models


async def list_models(request: HttpRequest) -> dict[str, Any]:
    """The models and their states."""
    return {"models": msgspec.to_builtins(await hub.engine.models())}


async def load(request: HttpRequest) -> dict[str, Any]:
    """The model is in memory."""
    await hub.engine.load(body(request, OneModel).model)
    return await list_models(request)


async def unload(request: HttpRequest) -> dict[str, Any]:
    """The model is out of memory."""
    await hub.engine.unload(body(request, OneModel).model)
    return await list_models(request)


async def status(request: HttpRequest) -> dict[str, Any]:
    """Whether all is well."""
    return {"saved": hub.saved, "engine": msgspec.structs.asdict(await hub.engine.stats())}


# Question sets


async def list_sets(request: HttpRequest) -> dict[str, Any]:
    """The user's question sets."""

    def find() -> list[dict[str, Any]]:
        return [selectors.set_json(each) for each in selectors.question_sets(request.user)]

    return {"sets": await read(find)}


async def add_set(request: HttpRequest) -> tuple[int, dict[str, Any]]:
    """A SQuAD file is a question set."""
    name, data = _upload(request)
    new = await write(squad_io.import_question_set, request.user, name, data)
    return 201, await read(selectors.set_json, new)


async def get_set(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """A question set."""
    return await read(lambda: selectors.set_json(selectors.question_set(request.user, id)))


async def delete_set(request: HttpRequest, id: UUID) -> HttpResponse:
    """The question set is gone."""
    for run in await read(lambda: list(selectors.question_set(request.user, id).runs.all())):
        await hub.stop_set(run.id)
    await write(services.delete_question_set, request.user, id)
    return HttpResponse(status=204)


async def begin_run(request: HttpRequest, id: UUID) -> tuple[int, dict[str, Any]]:
    """A model is on its way through the questions."""
    new = body(request, NewRun)
    run = await hub.run_set(services.create_run, request.user, id, new.model, new.with_context)
    return 201, await read(selectors.run_json, run)


async def get_run(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """A run and its scores so far."""
    return await read(lambda: selectors.run_json(selectors.run(request.user, id)))


async def get_predictions(request: HttpRequest, id: UUID) -> HttpResponse:
    """A run's answers as a file of predictions."""

    def find() -> tuple[str, dict[str, str]]:
        run = selectors.run(request.user, id)
        name = f"{run.model.replace('/', '-')}-{'with' if run.with_context else 'without'}.json"
        return name, selectors.predictions(run)

    name, found = await read(find)
    return _file(json.dumps(found, indent=1, ensure_ascii=False) + "\n", name, "application/json")


async def stop_run(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """The run is stopped; what it has stays."""
    await read(selectors.run, request.user, id)
    await hub.stop_set(id)
    return await get_run(request, id)


async def resume_run(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """The run goes on with the questions that have no answer."""
    await hub.run_set(services.resume_run, request.user, id)
    return await get_run(request, id)


async def difference(request: HttpRequest, id: UUID) -> dict[str, Any]:
    """Question by question, what two runs answered; `fixed` and `broke` count by exact match."""
    a, b = (_uuid(request.GET.get(name, "")) for name in "ab")
    await read(selectors.question_set, request.user, id)
    rows = await read(selectors.difference, request.user, a, b)
    fixed, broke = (sum(row["exact"] * sign > 0 for row in rows) for sign in (1, -1))
    return {"questions": rows, "fixed": fixed, "broke": broke}


async def export_feedback(request: HttpRequest) -> HttpResponse:
    """What the user said was right, as a SQuAD file."""
    share, part = request.GET.get("test_share", "0"), request.GET.get("part", "train")
    if part not in ("train", "test"):
        raise UserError(f"part is {part!r}, expected train or test")
    try:
        number = float(share)
    except ValueError:
        raise UserError(f"test_share is {share!r}, expected a number") from None
    found = await read(lambda: squad_io.corrections(selectors.judged(request.user), number))
    examples = found.train if part == "train" else found.test
    if not examples:
        raise UserError("no answer about a passage has been judged yet, or none that tells what is right")
    return _file(json.dumps(to_squad(examples), ensure_ascii=False), f"feedback-{part}.json", "application/json")


# Keys


async def list_keys(request: HttpRequest) -> dict[str, Any]:
    """The user's keys."""
    return {"keys": await read(lambda: [_key_json(each) for each in selectors.api_keys(request.user)])}


async def add_key(request: HttpRequest) -> tuple[int, dict[str, Any]]:
    """A new key, shown this once."""
    row, key = await write(services.create_api_key, request.user, body(request, NewKey).name)
    return 201, _key_json(row) | {"key": key}


async def revoke_key(request: HttpRequest, id: UUID) -> HttpResponse:
    """The key lets nobody in any more."""
    await write(services.revoke_api_key, request.user, id)
    return HttpResponse(status=204)


def _key_json(row: Any) -> dict[str, str]:
    return {"id": str(row.id), "name": row.name, "prefix": row.prefix, "created": row.created.isoformat()}
