"""Clients that connect and then say nothing, or not all of it: they are hung up on, and others are served meanwhile."""

import asyncio
import contextlib
import socket
import threading
import time

import httpx
import pytest
import uvicorn

from babl.web import asgi, connections

HEAD = b"GET /slow HTTP/1.1\r\nHost: here\r\n"


@pytest.fixture
def address(monkeypatch):
    """(host, port) of a server that waits a second for a head; it answers at once, or at /slow after two seconds."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)

    async def application(scope, receive, send):
        await asyncio.sleep(2 if scope["path"] == "/slow" else 0)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(application, http=connections.Connection, lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listening.getsockname()
    server.should_exit = True
    thread.join()


def seconds_until_closed(client):
    begun = time.monotonic()
    client.settimeout(40)
    while client.recv(4096):
        pass
    return time.monotonic() - begun


@pytest.mark.parametrize("said", [b"", HEAD, b"POST / HT"])
def test_who_does_not_finish_a_head_is_hung_up_on(address, said):
    with socket.create_connection(address) as client:
        client.sendall(said)
        assert 0.5 < seconds_until_closed(client) < 5


def test_neither_is_who_trickles_it_waited_for(address):
    with socket.create_connection(address) as client:
        begun = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - begun < 8:
                client.sendall(b"x")
                time.sleep(0.2)
        assert time.monotonic() - begun < 6


def test_a_second_request_is_waited_for_as_long_and_an_answer_as_long_as_it_takes(address):
    with socket.create_connection(address) as client:
        client.sendall(HEAD + b"\r\n")
        assert b"200 OK" in client.recv(4096), "two seconds later, which is longer than a head may take"
        client.sendall(b"GET / HTT")
        assert 0.5 < seconds_until_closed(client) < 5
    with httpx.Client(base_url=f"http://{address[0]}:{address[1]}") as http:
        assert [http.get("/").text for _ in range(3)] == ["ok"] * 3


def test_the_rest_of_a_body_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(asgi, "BODY_SECONDS", 0.05)
    pieces = [{"body": b"a", "more_body": True}]

    async def receive():
        if pieces:
            return pieces.pop()
        await asyncio.sleep(60)

    async def read():
        waiting = asgi._limited(receive, 10)
        assert (await waiting())["body"] == b"a"
        with pytest.raises(asgi.TooSlow):
            await waiting()

    asyncio.run(read())


@pytest.mark.slow
def test_a_thousand_half_requests_keep_nobody_out_and_are_gone_soon(server):
    before = httpx.get(f"{server.address}/healthz").elapsed.total_seconds()
    host, port = server.address.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        half = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(1024)]
        for client in half:
            client.sendall(b"POST /api/count HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le")
        for _ in range(20):
            assert httpx.get(f"{server.address}/healthz").elapsed.total_seconds() < 0.25 + before
        me = server.person()
        assert me.answer(me.ask(me.conversation(), "tokens=1 delay=0 served"))["content"] == "served"
        assert max(map(seconds_until_closed, half)) < connections.HEAD_SECONDS + 10
