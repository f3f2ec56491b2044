"""Whatever is sent to an address that takes JSON, the server answers it without a fault, and goes on."""

import json
import os
import subprocess
import sys
import uuid
from collections import Counter

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SCHEMAS = """
import json, sys, pathlib
from babl.web.serve import ServerOptions, prepare
prepare(ServerOptions(data=pathlib.Path(sys.argv[1])))
import msgspec
from babl.web.chat import engine_requests, openai, services
from babl.web.chat.exchange.format import File
from babl.web.chat.views import accounts, conversations, models, passages, sets
kinds = {
    "POST /api/conversations": conversations.NewConversation,
    "PATCH /api/conversations/ID": services.ConversationUpdate,
    "POST /api/conversations/ID/messages": services.NewQuestion, "POST /api/messages/ID/again": services.AskAgain,
    "PUT /api/messages/ID/feedback": services.NewFeedback, "POST /api/count": engine_requests.Draft,
    "POST /api/passages": passages.NewPassage, "POST /api/models/load": models.ModelName,
    "POST /api/sets/ID/runs": sets.NewRun, "POST /api/keys": accounts.NewKey,
    "POST /api/import": File, "POST /v1/chat/completions": openai.Chat,
    "POST /v1/completions": openai.Completion, "POST /v1/qa": openai.QA,
}
schemas, shared = msgspec.json.schema_components(kinds.values(), ref_template="{name}")
print(json.dumps([dict(zip(kinds, schemas)), shared]))
"""
PLAIN = [  # addresses without a body
    "GET /api/conversations", "GET /api/conversations/ID", "DELETE /api/conversations/ID", "GET /api/export",
    "GET /api/conversations/ID/messages", "GET /api/conversations/ID/export", "POST /api/messages/ID/stop",
    "DELETE /api/messages/ID/feedback", "GET /api/events", "GET /api/passages", "GET /api/passages/ID",
    "DELETE /api/passages/ID", "GET /api/models", "GET /api/status", "GET /api/sets", "GET /api/sets/ID",
    "DELETE /api/sets/ID", "GET /api/sets/ID/difference", "GET /api/runs/ID", "GET /api/runs/ID/predictions",
    "POST /api/runs/ID/stop", "POST /api/runs/ID/resume", "GET /api/feedback/export", "GET /api/keys",
    "DELETE /api/keys/ID", "GET /v1/models", "GET /v1/models/x", "GET /", "GET /c/ID/", "GET /sets/", "GET /settings/",
]  # fmt: skip
QUERIES = ["q", "page", "before", "after", "a", "b", "g", "archived", "deleted", "test_share", "part", "limit", "show"]
NUMBERS = [0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**20, 2**70, 0.5, -0.0, 1e308, 1e-320]
TEXTS = [
    "", " ", "a", "\0", "tokens=2 delay=0 a", "x" * 5000, "é\u0301\u200b😀", "\ud7ff\ufffe", "../..", "<script>",
    "NULL", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59+14:00", "2026-02-30T00:00:00", "' OR 1=1 --", "scripted",
    "%00", "\u202e",
]  # fmt: skip


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.fixture(scope="module")
def schemas(tmp_path_factory):
    """The schema of each body, out of the very types that the server reads it by."""
    command = [sys.executable, "-c", SCHEMAS, str(tmp_path_factory.mktemp("schemas"))]
    done = subprocess.run(command, env=os.environ | {"BABL_SCRIPTED": "1"}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def own(tmp_path_factory, serving):
    with serving(tmp_path_factory.mktemp("any"), {}) as server:
        yield server


@pytest.fixture(scope="module")
def known(own):
    """Somebody, a key, and ids of what there is."""
    me = own.person()
    conversation = me.conversation()
    passage = me.call("POST", "/api/passages", json={"text": "Rudi bakes."})
    answer = me.answer(me.ask(conversation, "tokens=1 delay=0 who?", passage=passage["id"]))
    qas = [{"id": "q", "question": "tokens=1 delay=0 who?", "answers": [{"text": "Rudi", "answer_start": 0}]}]
    tree = {"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "Rudi bakes.", "qas": qas}]}]}
    of = me.call("POST", "/api/sets?name=s", 201, content=json.dumps(tree))
    run = me.call("POST", f"/api/sets/{of['id']}/runs", json={"model": "scripted"})
    key = me.call("POST", "/api/keys", json={"name": "k"})["key"]
    return me, key, [conversation, passage["id"], answer["id"], of["id"], run["id"]]


def hostile():
    """Any JSON: of the wrong type, too large, too deep."""
    leaf = st.sampled_from([None, True, *NUMBERS, *TEXTS, nested(5), nested(900), {"a": {"b": None}}])
    return leaf | st.lists(leaf, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), leaf, max_size=3)


def value(schema, shared, ids, depth=0):
    """Values of a schema, and now and then one that is none of it."""
    if "$ref" in schema:
        return value(shared[schema["$ref"]], shared, ids, depth + 1)
    if depth > 12 or not schema:
        return hostile()
    if "anyOf" in schema:
        return st.one_of(*(value(each, shared, ids, depth + 1) for each in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        right = st.sampled_from(schema.get("enum", [schema.get("const")]))
    elif schema.get("format") == "uuid":
        right = st.sampled_from(ids) | st.uuids().map(str)
    else:
        right = {
            "string": st.sampled_from(TEXTS) | st.text(max_size=20),
            "integer": st.integers(0, 20) | st.sampled_from(NUMBERS),
            "number": st.floats(0, 2) | st.sampled_from(NUMBERS),
            "boolean": st.booleans(),
            "null": st.none(),
            "array": st.lists(value(schema.get("items") or {}, shared, ids, depth + 1), max_size=3),
        }.get(schema.get("type"), hostile())
    if schema.get("type") == "object" and "properties" in schema:
        needed = set(schema.get("required", ()))
        fields = {name: value(each, shared, ids, depth + 1) for name, each in schema["properties"].items()}
        right = st.fixed_dictionaries(
            {name: fields[name] for name in fields if name in needed},
            optional={name: fields[name] for name in fields if name not in needed},
        )
    return st.integers(0, 7).flatmap(lambda chance: right if chance else hostile())


def requests(schemas, ids):
    """(method, path, body or None): a body as its type has it, or not."""
    bodies, shared = schemas

    def asked(route, body):
        method, path = route.split(" ")
        query = st.dictionaries(st.sampled_from(QUERIES), st.sampled_from(TEXTS) | st.sampled_from(ids), max_size=2)
        paths = st.sampled_from([path.replace("ID", id) for id in ids])
        return st.tuples(st.just(method), paths, query, body)

    plain = st.sampled_from(PLAIN).flatmap(lambda route: asked(route, st.none()))
    typed = st.one_of(*(asked(route, value(schema, shared, ids)) for route, schema in bodies.items()))
    return st.one_of(typed, typed, plain)


def hold(own, known, schemas, examples):
    me, key, ids = known
    ids = [*ids, str(uuid.uuid4())]
    engine, log = own.engine().pid, own.log.stat().st_size
    seen: Counter[int] = Counter()
    v1 = httpx.Client(base_url=own.address, headers={"Authorization": f"Bearer {key}"}, timeout=30)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(requests(schemas, ids))
    def answered(request):
        method, path, query, body = request
        http = v1 if path.startswith("/v1") else me.http
        content = None if body is None else json.dumps(body)
        with http.stream(method, path, params=query, content=content) as response:
            assert response.status_code < 500, (request, response.read()[:500])
            seen[response.status_code // 100] += 1

    answered()
    assert min(seen[2], seen[4]) > examples / 50, "some requests are right, and some are not"
    said = own.log.read_bytes()[log:].decode(errors="replace")
    assert "Traceback" not in said, said[said.index("Traceback") - 200 :][:2000]
    assert own.engine().pid == engine
    assert me.answer(me.ask(me.conversation(), "tokens=2 delay=0 still here"))["content"] == "still here"


def test_no_request_is_a_fault(own, known, schemas):
    hold(own, known, schemas, 250)


@pytest.mark.slow
def test_no_request_of_thousands_is_a_fault(own, known, schemas):
    hold(own, known, schemas, 2500)
