"""What hostile requests leave in memory: next to nothing, however many they are."""

import contextlib
import json
import re
import time
import uuid

import httpx
import psutil
import pytest

pytestmark = pytest.mark.slow
TIMES, GROWTH = 200, 30 * 2**20
HOUSE = {
    "BABL_AUTH": "login",
    "SECRET_KEY": "z" * 50,
    "ALLOWED_HOSTS": "127.0.0.1",
    "BABL_TRUSTED_PROXIES": "127.0.0.1",
}


@pytest.fixture(scope="module")
def house(tmp_path_factory, serving):
    with serving(tmp_path_factory.mktemp("memory"), HOUSE) as server:
        yield server


@pytest.fixture(scope="module")
def me(house):
    return house.add_user("ada")


def deep(number):
    return "[" * 5_000 + str(number) + "]" * 5_000


def stranger(house, number):
    """Each comes from an address of its own."""
    address = f"10.0.{number // 250}.{number % 250}"
    return httpx.Client(base_url=house.address, headers={"X-Forwarded-For": address}, timeout=60)


def log_in(house, me, number):
    with stranger(house, number) as http:
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', http.get("/login/").text)[1]
        form = {"username": f"{number}" + "n" * 14_000, "password": "p", "csrfmiddlewaretoken": token}
        return http.post("/login/", data=form).status_code


def send_a_body_before_login(house, me, number):
    with stranger(house, number) as http, contextlib.suppress(httpx.WriteError):
        return http.post("/api/import", content=b"x" * 2**20).status_code
    return 401  # hung up on


def half_a_request(house, me, number):
    with contextlib.suppress(httpx.HTTPError), stranger(house, number) as http:
        http.post("/login/", content=iter([b"username=", b"x" * 2**16]), timeout=0.02)
    return 400


def keys(house, me, number):
    with stranger(house, number) as http:
        return http.get("/v1/models", headers={"Authorization": f"Bearer {number}{'k' * 8_000}"}).status_code


KINDS = {
    "names of those who log in": log_in,
    "bodies before login": send_a_body_before_login,
    "half requests": half_a_request,
    "keys": keys,
    "deep JSON": lambda house, me, n: me.http.post("/api/conversations", content=f'{{"title": {deep(n)}}}').status_code,
    "huge names": lambda house, me, n: me.http.post("/api/conversations", json={"title": f"{n}" * 300_000}).status_code,
    "refused imports": lambda house, me, n: (
        me.http.post(
            "/api/import",
            content=json.dumps({"format": "babl-conversations", "version": 1, "passages": ["x" * 2**20, n]}),
        ).status_code
    ),
    "refused sets": lambda house, me, n: me.http.post("/api/sets", content=f'{{"data": {deep(n)}}}').status_code,
    "counts": lambda house, me, n: (
        me.http.post("/api/count", json={"content": f"{n} " + "word " * 19_000, "model": "scripted"}).status_code
    ),
    "searches": lambda house, me, n: me.http.get("/api/conversations", params={"q": f"w{n} " * 500}).status_code,
    "settings": lambda house, me, n: (
        me.http.post("/api/conversations", json={"settings": {"stop": [f"{n}" * 100_000], "seed": 2**70}}).status_code
    ),
    "unknown things": lambda house, me, n: me.http.get(f"/api/conversations/{uuid.uuid4()}?{'a' * 8_000}").status_code,
    "unknown files": lambda house, me, n: me.http.get(f"/static/{n}{'f' * 4_000}").status_code,
    "strange methods": lambda house, me, n: me.http.request(f"M{n}", "/api/models", content=b"x" * 10**5).status_code,
}


def taken(house):
    """Returns the bytes of the server and of its engine."""
    return sum(psutil.Process(pid).memory_info().rss for pid in (house.process.pid, house.engine().pid))


@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_of_a_kind_leave_nothing(house, me, kind):
    def ask():
        return me.answer(me.ask(me.conversation(), "tokens=2 delay=0 as ever"))["content"]

    for _ in range(10):
        ask()
    before = taken(house)
    codes = {KINDS[kind](house, me, number) for number in range(TIMES)}
    assert max(codes) < 500, codes
    time.sleep(0.5)
    assert taken(house) - before < GROWTH, (taken(house) - before) >> 20
    assert ask() == "as ever"
