"""What is left when something breaks: the question, and the answer as far as it came."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

LONG = "tokens=400 delay=0.02 "


def wait_for(condition, seconds=15):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def partial(me, conversation):
    """Returns the newest answer of a conversation once some of it is stored."""
    return wait_for(lambda: (m := me.thread(conversation)["messages"][-1]) and m.get("content") and m)


def test_a_killed_server_keeps_the_question_and_what_was_answered(own_server):
    me = own_server.person()
    id = me.conversation()
    asked = me.ask(id, LONG + "alpha beta")
    before = partial(me, id)["content"]
    engine = own_server.engine()
    own_server.kill()
    wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
    own_server.start()
    me.http.base_url = own_server.address  # the session goes on
    question, answer = me.thread(id)["messages"]
    assert question["content"] == LONG + "alpha beta" and answer["status"] == "interrupted"
    assert answer["content"].startswith(before) and len(answer["content"].split()) < 400
    assert me.answer(asked)["content"] == answer["content"]
    after = me.ask(id, "tokens=2 gamma", parent=answer["id"])
    assert me.answer(after)["content"] == "gamma gamma"


def test_a_killed_engine_costs_one_answer(own_server):
    me = own_server.person()
    id = me.conversation()
    asked = me.ask(id, LONG + "x")
    partial(me, id)
    own_server.engine().kill()
    answer = me.answer(asked)
    assert (answer["status"], answer["error"]) == ("interrupted", "engine") and answer["content"].startswith("x x x")
    assert me.answer(me.ask(id, "tokens=2 y", parent=answer["id"]))["content"] == "y y"
    assert me.thread(id)["messages"][1]["content"] == answer["content"]


def test_what_a_broken_model_wrote_is_no_answer(own_server):
    me = own_server.person()
    answer = me.answer(me.ask(me.conversation(), "tokens=60 delay=0.02 after=50 fail=broken x"))
    assert (answer["status"], answer["error"], answer["content"]) == ("error", "broken", "")
    assert answer["error_message"] == "the script says fail=broken"


def test_a_server_that_is_told_to_end_lets_fifty_streams_go(own_server):
    me = own_server.person()
    conversations = [me.conversation() for _ in range(10)]
    asked = [me.ask(id, LONG + "x") for id in conversations]
    streams, opened = [asked[i % 10]["stream"] for i in range(50)], threading.Barrier(51)

    def follow(stream):
        frames = me_too[stream].frames(stream)
        found = [next(frames)]
        opened.wait(30)
        return found + list(frames)

    me_too = dict.fromkeys(streams, me)
    me.http = httpx.Client(
        base_url=own_server.address, headers=me.http.headers, cookies=me.http.cookies, timeout=30,
        limits=httpx.Limits(max_connections=60),
    )  # fmt: skip
    with ThreadPoolExecutor(50) as pool:
        following = [pool.submit(follow, stream) for stream in streams]
        opened.wait(30)
        time.sleep(0.5)
        begun = time.monotonic()
        assert own_server.end() == 0
        assert time.monotonic() - begun < 15
        ends = [each.result()[-1][1] for each in following]
    assert ends == ["reconnect"] * 50
    own_server.start()
    me.http.base_url = own_server.address
    for id in conversations:
        answer = me.thread(id)["messages"][1]
        assert answer["status"] == "interrupted" and answer["content"].startswith("x x")


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for eight megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_file_that_the_disk_has_no_room_for_leaves_nothing(small_disk, serving):
    with serving(small_disk, {}) as server:
        me = server.person()
        me.conversation(title="there before")
        now, how = "2026-01-01T00:00:00+00:00", {"kind": "chat", "model": "scripted", "status": "done"}
        conversations = []
        for _ in range(120):
            asked, answer = str(uuid.uuid4()), str(uuid.uuid4())
            question = {"id": asked, "role": "user", "content": "who? " * 10_000, "created": now}
            said = {"id": answer, "role": "assistant", "content": "me " * 20_000, "created": now}
            messages = [question, said | {"parent": asked, "generation": how}]
            times = {"created": now, "updated": now}
            conversations.append({"id": str(uuid.uuid4()), "title": "t", "messages": messages} | times)
        file = {"format": "babl-conversations", "version": 1, "passages": [], "conversations": conversations}
        refused = me.call("POST", "/api/import", 507, json=file)
        assert refused["error"]["code"] == "not_saved"
        subprocess.run(["mount", "-o", "remount,size=32m", small_disk], check=True)
        titles = lambda: [each["title"] for each in me.call("GET", "/api/conversations")["conversations"]]  # noqa: E731
        wait_for(lambda: titles() == ["there before"])
        me.conversation(title="goes on")


def test_a_run_of_questions_ends_when_the_disk_fills_and_can_go_on_and_stop(small_disk, serving):
    with serving(small_disk, {}) as server:
        me = server.person()
        asked = [
            {"id": str(i), "question": f"delay=0.05 {i}", "answers": [{"text": "one", "answer_start": 0}]}
            for i in range(400)
        ]
        file = {"version": "v1", "data": [{"title": "T", "paragraphs": [{"context": "one two three", "qas": asked}]}]}
        questions = me.call("POST", "/api/sets?name=x", json=file)["id"]
        run = "/api/runs/" + me.call("POST", f"/api/sets/{questions}/runs", json={"model": "scripted"})["id"]
        wait_for(lambda: me.call("GET", run)["answered"])
        with pytest.raises(OSError, match="No space left"), (small_disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 512)
        wait_for(lambda: "the end of a run could not be stored" in server.log.read_text(), 30)
        assert me.call("GET", run)["status"] == "running"
        (small_disk / "filler").unlink()
        wait_for(lambda: me.call("GET", run)["status"] == "interrupted")
        assert me.call("POST", f"{run}/resume")["status"] in ("queued", "running")
        assert me.call("POST", f"{run}/stop")["status"] == "stopped"


def test_purging_ends_the_answer_that_is_being_written(own_server):
    me = own_server.person()
    id = me.conversation()
    asked = me.ask(id, "tokens=2000 delay=0.05 x")
    frames = me.frames(asked["stream"])
    next(frames)
    me.call("PATCH", f"/api/conversations/{id}", json={"deleted": True})
    me.call("DELETE", f"/api/conversations/{id}", 204)
    assert "done" not in [event for _, event, _ in frames], "the stream has ended"
    wait_for(lambda: me.call("GET", "/api/status")["engine"]["running"] == 0)
    assert "Traceback" not in own_server.log.read_text()


def test_a_full_disk_is_told_and_loses_nothing_once_there_is_room(small_disk, serving):
    with serving(small_disk, {}) as server:
        me = server.person()
        id = me.conversation()
        asked = me.ask(id, "tokens=150 delay=0.02 " + "many words " * 20)
        filler, refused = small_disk / "filler", None
        for _, event, data in me.frames(asked["stream"]):
            if event == "delta" and data["at"] > 50 and refused is None and not filler.exists():
                with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            if event == "state" and not data["saved"] and refused is None:
                refused = me.ask(id, "kept by the client " * 1000, 507)
                assert me.call("GET", "/readyz", 503)["saved"] is False
                filler.unlink()
            if event == "done":
                answer = data["message"]
        assert refused["error"]["code"] == "not_saved", "the status line said so, and so did the next request"
        assert answer["status"] == "done" and len(answer["content"].split()) == 150
        assert me.thread(id)["messages"][1]["content"] == answer["content"]
        assert me.call("GET", "/readyz", 200)["saved"] is True


def test_a_full_queue_says_when_to_come_again_and_keeps_the_question(own_server):
    me = own_server.person()
    id = me.conversation()
    for _ in range(70):  # two each; 64 are answered at once and 64 wait
        last = me.http.post(
            f"/api/conversations/{id}/messages",
            json={"client_id": str(uuid.uuid4()), "content": LONG, "models": ["scripted"], "contexts": [True, False]},
        )
        if last.status_code != 201:
            break
    assert last.status_code == 429 and int(last.headers["Retry-After"]) >= 1
    refused = last.json()
    assert refused["error"]["code"] == "busy" and refused["question"]["content"] == LONG
    shown = me.thread(id)["messages"]
    assert shown[0]["id"] == refused["question"]["id"]
    assert {c["status"] for c in shown[1]["columns"]} >= {"error"}
    failed = next(c for c in shown[1]["columns"] if c["error"] == "busy")
    before = me.call("GET", "/api/status")["engine"]["pid"]
    own_server.engine().kill()  # all those before are gone
    wait_for(lambda: (r := me.http.get("/api/status")).is_success and r.json()["engine"]["pid"] != before)
    body = {"client_id": str(uuid.uuid4()), "settings": {"max_new_tokens": 2}}
    again = wait_for(
        lambda: (r := me.http.post(f"/api/messages/{failed['id']}/again", json=body)).is_success and r.json()
    )
    assert me.answer(again)["status"] == "done"


def test_questions_come_at_a_limited_rate(tmp_path, serving):
    with serving(tmp_path / "data", {"BABL_QUESTIONS_PER_MINUTE": "3"}) as server:
        me = server.person()
        id = me.conversation()
        for _ in range(3):
            me.ask(id, "tokens=1 x")
        refused = me.ask(id, "tokens=1 x", 429)
        assert refused["error"]["code"] == "rate" and 10 < refused["error"]["retry_after"] <= 20
    with serving(tmp_path / "another", {"BABL_QUESTIONS_PER_MINUTE": "3"}) as server:
        key = server.person().call("POST", "/api/keys", json={"name": "k"})["key"]
        asked = {"headers": {"Authorization": f"Bearer {key}"}, "json": {"model": "scripted", "prompt": "tokens=1 x"}}
        for n, status in ((2, 200), (2, 429)):
            asked["json"]["n"] = n
            response = httpx.post(f"{server.address}/v1/completions", **asked)
            assert response.status_code == status, "each of several answers counts"


def test_no_message_is_in_the_log(own_server):
    me = own_server.person()
    id = me.conversation(title="TITLE-X")
    me.answer(me.ask(id, "tokens=2 after=1 fail=prompt SECRET-X"))
    me.ask(id, "SECRET-X" * 20_000, 400)
    me.call("POST", "/api/passages", json={"text": "SECRET-X passage"})
    me.call("POST", "/api/import", 400, content=b'{"format": "SECRET-X"}')
    me.call("GET", "/api/conversations", params={"q": "SECRET-X"})
    key = me.call("POST", "/api/keys", json={"name": "k"})["key"]
    bearer = {"Authorization": f"Bearer {key}"}
    httpx.post(f"{own_server.address}/v1/qa", headers=bearer, json={"model": "m", "question": "SECRET-X", "x": "{"})
    own_server.engine().kill()
    me.answer(me.ask(id, "tokens=1 SECRET-X"))
    own_server.end()
    for file in [own_server.log, *own_server.data.glob("*.log")]:
        text = file.read_text()
        assert "SECRET-X" not in text and "TITLE-X" not in text and key not in text, text


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once_and_leaves_no_process(tmp_path, serving, signal_number):
    with serving(tmp_path / "data", {}) as server:
        server.person()
        engine = wait_for(lambda: server.engine())
        begun = time.monotonic()
        server.process.send_signal(signal_number)
        assert server.process.wait(15) == 0
        assert time.monotonic() - begun < 8
        assert not engine.is_running()


def test_a_restarted_postgresql_costs_no_word_and_the_server_keeps_the_database(own_postgresql, serving, tmp_path):
    environment = {"DATABASE_URL": own_postgresql.database()}
    command = [sys.executable, "-m", "babl.cli", "serve", "--data", str(tmp_path / "other"), "--port", "0"]
    with serving(tmp_path / "one", environment) as server:
        me = server.person()
        id = me.conversation()
        asked = me.ask(id, "tokens=150 delay=0.02 alpha beta")
        partial(me, id)
        own_postgresql.control("restart")
        answer = me.answer(asked)
        assert answer["status"] == "done" and answer["content"].split() == ["alpha", "beta"] * 75
        wait_for(lambda: me.thread(id)["messages"][-1]["content"] == answer["content"])
        other = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
        assert other.returncode == 2 and "DATABASE_URL: another server uses this database" in other.stderr
        assert me.answer(me.ask(id, "tokens=1 delay=0 on", parent=answer["id"]))["content"] == "on"
