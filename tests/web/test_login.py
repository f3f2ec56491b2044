"""Logging in with name and password: who is refused, what that costs the server, and where it leads."""

import contextlib
import html
import json
import os
import re
import subprocess
import sys
import time

import httpx
import psutil
import pytest

PROXY = {"BABL_TRUSTED_PROXIES": "127.0.0.1"}  # so that a test can come from many addresses


@pytest.fixture(scope="module")
def house(tmp_path_factory, serving):
    """A server of its own: its limits are not those of other tests."""
    environment = {"BABL_AUTH": "login", "SECRET_KEY": "y" * 50, "ALLOWED_HOSTS": "127.0.0.1"}
    with serving(tmp_path_factory.mktemp("logins"), environment | PROXY) as this:
        this.add_user("ada")
        yield this


def stranger(house, address):
    """Returns a client at an address, and the form that it was given."""
    http = httpx.Client(base_url=house.address, headers={"X-Forwarded-For": address}, timeout=60)
    page = http.get("/login/").text
    return http, {"csrfmiddlewaretoken": re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page)[1]}


def attempt(house, address, name, password):
    http, form = stranger(house, address)
    return http.post("/login/", data=form | {"username": name, "password": password}).status_code


@pytest.mark.parametrize("first", [[f"somebody-{i}" for i in range(10)], []], ids=["at others first", "at her alone"])
def test_nobody_who_is_refused_locks_another_out(house, first):
    address = f"6.6.6.{len(first)}"
    http, form = stranger(house, address)
    names = [*first, *["ada"] * 24]
    begun = time.monotonic()
    codes = [http.post("/login/", data=form | {"username": name, "password": "x"}).status_code for name in names]
    let_in_again = 1 + (time.monotonic() - begun) * 10 / 60  # ten a minute
    assert codes[:10] == [401] * 10 and codes.count(401) <= 10 + let_in_again and 429 in codes
    assert attempt(house, f"7.7.7.{len(first)}", "ada", "password-of-ada") == 302


def test_long_names_stay_nowhere(house):
    http, form = stranger(house, "8.8.8.8")
    process = psutil.Process(house.process.pid)
    before = process.memory_info().rss
    for i in range(12):  # said to be so long, and not
        body = b"username=" + str(i).encode() + b"x" * (10 * 2**20)
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        assert http.post("/login/", content=body, headers=kind).status_code == 413
        with contextlib.suppress(httpx.WriteError):  # it is answered, and hung up on, before it has arrived
            assert http.post("/login/", content=iter([body]), headers=kind).status_code == 413
    assert process.memory_info().rss - before < 30 * 2**20
    assert http.post("/login/", data=form | {"username": "x" * 10_000, "password": "x"}).status_code == 401


@pytest.mark.parametrize(
    ("start", "goal", "mistakes"),
    [
        ("/", "/", 0),
        ("/", "/", 2),
        ("/login/", "/", 0),
        ("/settings/?a=1", "/settings/?a=1", 1),
        ("/login/?next=/sets/", "/sets/", 1),
        ("/login/?next=/login/%3Fnext%3D/sets/", "/", 0),
        ("/login/?next=/./login/", "/", 0),
        ("/login/?next=//evil.example/", "/", 0),
    ],
)
def test_logging_in_leads_to_the_page_that_was_asked_for(house, start, goal, mistakes):
    address = f"9.9.{mistakes}.{len(start)}"
    with httpx.Client(base_url=house.address, headers={"X-Forwarded-For": address}, follow_redirects=True) as http:
        page = http.get(start)
        for password in [*["mistyped"] * mistakes, "password-of-ada"]:
            action = html.unescape(re.search(r'action="([^"]+)"', page.text)[1])
            token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page.text)[1]
            page = http.post(action, data={"username": "ada", "password": password, "csrfmiddlewaretoken": token})
        assert page.status_code == 200 and page.url.raw_path.decode() == goal
        assert 'name="password"' not in page.text


def command(house, *options, **how):
    babl = [sys.executable, "-m", "babl.cli", "serve", "--data", str(house.data), *options]
    return subprocess.run(babl, env=os.environ | house.environment, capture_output=True, text=True, **how)


def test_a_new_password_ends_what_let_in_before(house):
    eve = house.add_user("eve")
    key = eve.call("POST", "/api/keys", json={"name": "k"})["key"]
    bearer = {"Authorization": f"Bearer {key}"}
    assert httpx.get(f"{house.address}/v1/models", headers=bearer).status_code == 200
    command(house, "--add-user", "eve", input="another password\n", check=True)
    assert httpx.get(f"{house.address}/v1/models", headers=bearer).status_code == 401
    assert eve.http.get("/api/conversations").status_code == 401
    assert attempt(house, "5.5.5.1", "eve", "password-of-eve") == 401
    assert attempt(house, "5.5.5.2", "eve", "another password") == 302


def test_a_user_is_removed_with_everything(house):
    bob, other = house.add_user("bob"), house.add_user("carl")
    passage = bob.call("POST", "/api/passages", json={"text": "Rudi bakes."})
    qas = [{"id": "q", "question": "tokens=1 who?", "answers": [{"text": "Rudi", "answer_start": 0}]}]
    tree = {"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "Rudi bakes.", "qas": qas}]}]}
    bob.call("POST", "/api/sets?name=s", 201, content=json.dumps(tree))
    for who in (bob, other):
        who.answer(who.ask(who.conversation(), "tokens=1 delay=0 mine", passage=passage["id"] if who is bob else None))
    done = command(house, "--remove-user", "bob")
    assert (done.returncode, done.stdout) == (0, "bob and 1 conversations are removed\n"), done.stderr
    assert bob.http.get("/api/conversations").status_code == 401
    assert attempt(house, "5.5.5.3", "bob", "password-of-bob") == 401
    assert len(other.call("GET", "/api/conversations")["conversations"]) == 1
    again = command(house, "--remove-user", "bob")
    assert (again.returncode, again.stderr) == (2, "babl serve: there is no user 'bob'\n")
    house.add_user("bob")
    assert house.add_user("bob").call("GET", "/api/export")["passages"] == []
