import json
import re
import uuid
from pathlib import Path

import httpx
import pytest

VIEWS = Path(__file__).parents[2] / "babl" / "web" / "chat" / "views"
OPEN = {"login/", "readyz"}  # to everybody


@pytest.fixture(scope="module")
def everything(shared_house):
    """Two people, and one thing of each kind that belongs to the first."""
    mine, theirs = shared_house.add_user("ann"), shared_house.add_user("bob")
    conversation = mine.conversation(title="secret")
    passage = mine.call("POST", "/api/passages", json={"text": "The secret is 42."})
    answer = mine.answer(mine.ask(conversation, "What is the secret?", passage=passage["id"]))
    questions = {
        "version": "1.1",
        "data": [
            {
                "title": "t",
                "paragraphs": [
                    {
                        "context": "It is 42.",
                        "qas": [{"id": "q", "question": "What?", "answers": [{"text": "42", "answer_start": 6}]}],
                    }
                ],
            }
        ],
    }
    set = mine.call("POST", "/api/sets", content=json.dumps(questions))
    run = mine.call("POST", f"/api/sets/{set['id']}/runs", json={"model": "scripted"})
    key = mine.call("POST", "/api/keys", json={"name": "k"})
    ids = {"conversations": conversation, "messages": answer["id"], "passages": passage["id"], "sets": set["id"]}
    ids |= {"runs": run["id"], "keys": key["id"], "c": conversation}
    return shared_house, mine, theirs, ids, key["key"]


def routes():
    """Every address with every method it has, out of the very lists that the server uses."""
    for pattern, handlers in re.findall(r'path\(\s*"([^"]*)",\s*(.*?)\),?\n', SOURCE, re.DOTALL):
        methods = re.findall(r"(GET|POST|PATCH|PUT|DELETE)=", handlers) or ["GET"]
        for method in methods:
            yield pattern, method


SOURCE = "".join(path.read_text() for path in sorted(VIEWS.glob("*.py")))
ROUTES = sorted(set(routes()))


def test_the_walk_sees_every_address():
    paths = re.findall(r"\bpath\(", SOURCE)
    assert len({pattern for pattern, _ in ROUTES}) == len(paths) and len(ROUTES) > 40


def fill(pattern, ids):
    kind = pattern.removeprefix("api/").split("/")[0]
    return "/" + pattern.replace("<uuid:id>", ids.get(kind, "")).replace("<path:name>", "scripted")


@pytest.mark.parametrize(("pattern", "method"), ROUTES)
def test_nobody_comes_in_without_a_name(everything, pattern, method):
    server, _, _, ids, _ = everything
    if pattern in OPEN:
        return
    url = server.address + fill(pattern, ids)
    for headers in ({}, {"Authorization": "Bearer babl-wrong"}, {"Cookie": "babl_session=wrong"}):
        response = httpx.request(method, url, headers=headers)
        # Without the header that proves where a request comes from, not even the name is asked for.
        assert response.status_code in ((401,) if method == "GET" or pattern.startswith("v1") else (401, 403))
        assert "secret" not in response.text


BODIES = {
    ("api/conversations/<uuid:id>", "PATCH"): {"title": "mine now"},
    ("api/conversations/<uuid:id>/messages", "POST"): {"client_id": str(uuid.uuid4()), "content": "x", "models": ["m"]},
    ("api/messages/<uuid:id>/again", "POST"): {"client_id": str(uuid.uuid4())},
    ("api/messages/<uuid:id>/feedback", "PUT"): {"good": False},
    ("api/sets/<uuid:id>/runs", "POST"): {"model": "m"},
}


@pytest.mark.parametrize(("pattern", "method"), [route for route in ROUTES if "<uuid:id>" in route[0]])
def test_what_is_anothers_is_unknown(everything, pattern, method):
    _, mine, theirs, ids, _ = everything
    before = mine.thread(ids["conversations"])
    query = f"?a={ids['runs']}&b={ids['runs']}" if pattern.endswith("difference") else ""
    response = theirs.http.request(method, fill(pattern, ids) + query, json=BODIES.get((pattern, method), {}))
    assert response.status_code == 404, response.text
    assert "secret" not in response.text and mine.thread(ids["conversations"]) == before
    mine.call("GET", f"/api/runs/{ids['runs']}", 200)


def test_what_is_anothers_cannot_be_used_either(everything):
    _, mine, theirs, ids, _ = everything
    own = theirs.conversation()
    theirs.call("GET", f"/api/events?g={ids['messages']}", 404)
    theirs.ask(own, "x", 404, passage=ids["passages"])
    theirs.ask(own, "x", 409, parent=ids["messages"])
    theirs.call("PATCH", f"/api/conversations/{own}", 404, json={"passage": ids["passages"]})
    theirs.call("PATCH", f"/api/conversations/{own}", 404, json={"leaf": ids["messages"]})
    draft = {"content": "x", "model": "scripted"}
    for foreign in ({"conversation": ids["conversations"]}, {"passage": ids["passages"]}):
        theirs.call("POST", "/api/count", 404, json=draft | foreign)
    theirs.call("POST", "/api/count", 404, json=draft | {"kind": "chat", "parent": ids["messages"]})
    theirs.call("POST", "/api/conversations", 409, json={"id": ids["conversations"]})
    assert theirs.call("GET", "/api/conversations", params={"q": "secret"})["conversations"] == []
    for path in ("/api/export", "/api/passages", "/api/sets", "/api/keys", "/"):
        assert "secret" not in theirs.http.get(path).text and ids["sets"] not in theirs.http.get(path).text
    copied = mine.http.get("/api/export").content
    theirs.call("POST", "/api/import", content=copied)
    again = theirs.call("POST", "/api/import", content=copied)
    assert again == {"conversations": 0, "messages": 0, "passages": 0}, "a copy of one's own, made once"
    assert mine.thread(ids["conversations"])["title"] == "secret"
    assert "secret" in theirs.http.get("/api/export").text


def test_a_key_opens_v1_alone_and_not_for_ever(everything):
    server, mine, _, ids, key = everything
    bearer = {"Authorization": f"Bearer {key}"}
    assert httpx.get(f"{server.address}/v1/models", headers=bearer).status_code == 200
    assert httpx.get(f"{server.address}/metrics", headers=bearer).status_code == 200
    assert httpx.get(f"{server.address}/api/conversations", headers=bearer).status_code == 401
    assert mine.http.get("/v1/models").status_code == 401, "a cookie is no key"
    mine.call("DELETE", f"/api/keys/{ids['keys']}", 204)
    for path in ("/v1/models", "/v1/models/scripted", "/metrics"):
        assert httpx.get(server.address + path, headers=bearer).status_code == 401
    for path in ("/v1/qa", "/v1/completions", "/v1/chat/completions"):
        response = httpx.post(server.address + path, headers=bearer, json={"model": "scripted"})
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"


def test_a_request_from_another_page_changes_nothing(everything):
    _, mine, _, _, _ = everything
    token = mine.http.headers.pop("X-CSRFToken")
    try:
        assert mine.call("POST", "/api/conversations", 403, json={})["error"]["code"] == "csrf"
    finally:
        mine.http.headers["X-CSRFToken"] = token


def test_another_name_for_the_server_is_refused(everything):
    server, *_ = everything
    assert httpx.get(f"{server.address}/login/", headers={"Host": "evil.example"}).status_code == 400


def test_passwords_cannot_be_tried_without_end(shared_house):
    page = httpx.Client(base_url=shared_house.address)
    token = re.search(r'name="csrf-token" content="(\w+)"', page.get("/login/").text)[1]
    form = {"username": "nobody", "password": "x", "csrfmiddlewaretoken": token}
    codes = [page.post("/login/", data=form).status_code]
    while codes[-1] == 401 and len(codes) < 60:  # on a busy machine some come back meanwhile
        codes.append(page.post("/login/", data=form).status_code)
    assert codes[0] == 401 and codes[-1] == 429


def test_every_answer_forbids_what_a_page_does_not_need(everything):
    server, mine, *_ = everything
    for path in ("/", "/login/", "/api/conversations", "/static/babl.css", "/nowhere"):
        headers = mine.http.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
    for name in ("none.css", "", "js/", "..%2f..%2fsettings.py", "js/app.js%00"):
        missing = httpx.get(f"{server.address}/static/{name}")
        assert (missing.status_code, missing.text) == (404, "there is no such file\n")
        assert "content-security-policy" in missing.headers
    assert httpx.post(f"{server.address}/static/babl.css").status_code == 405
    assert "Traceback" not in server.log.read_text()
    assert httpx.get(f"{server.address}/healthz").text == "ok\n"
    assert httpx.get(f"{server.address}/readyz").json()["database"] is True
