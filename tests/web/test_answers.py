import itertools
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, settings
from hypothesis import strategies as st

from babl.web.chat.render import span_json

SLOW = "tokens=60 delay=0.04 "  # 2.4 seconds


def collected(frames):
    """Returns the text of a stream's first answer, no character missed or doubled, and its last frame."""
    text, last = "", None
    for _, event, data in frames:
        if event == "delta":
            assert data["at"] == len(text)
            text += data["text"]
        last = event, data
    return text, last


def test_an_answer_is_streamed_and_then_there(me):
    id = me.conversation()
    asked = me.ask(id, "tokens=20 delay=0.1 the cat sat")
    frames = list(me.frames(asked["stream"]))
    text, (event, data) = collected(frames)
    assert text == " ".join(itertools.islice(itertools.cycle(["the", "cat", "sat"]), 20))
    assert event == "done" and data["message"]["content"] == text and data["message"]["status"] == "done"
    deltas = [data for _, event, data in frames if event == "delta"]
    assert len(deltas) > 5, "as it is written, not at the end"
    words = list(itertools.accumulate(len(delta["text"].split()) for delta in deltas))
    assert [delta["tokens"] for delta in deltas] == words, "each word that is scripted is a token"
    answer = me.thread(id)["messages"][1]
    assert answer["content"] == text and answer["tokens"] == 20 and answer["tokens_per_second"] > 1
    assert answer["prompt_tokens"] == 3 and answer["finish"] == "eos" and answer["weights"] == "scripted"
    assert me.thread(id)["title"] == "tokens=20 delay=0.1 the cat sat"
    assert collected(me.frames(asked["stream"]))[0] == text, "whoever comes later reads the same"


def test_two_tabs_and_one_that_comes_again_see_the_same(me):
    id = me.conversation()
    asked = me.ask(id, SLOW + "a b c d e f g")
    with ThreadPoolExecutor(3) as pool:
        early = pool.submit(lambda: collected(me.frames(asked["stream"])))
        time.sleep(0.8)
        reloaded = me.thread(id)
        assert reloaded["live"] == [asked["answers"][0]["id"]]
        assert reloaded["messages"][1]["content"], "what was saved so far is in the page"
        late = pool.submit(lambda: collected(me.frames(asked["stream"])))
        expected = early.result()[0]
        assert late.result()[0] == expected and len(expected) == 119


def test_a_stream_that_breaks_after_any_frame_goes_on_where_it_was(me):
    asked = me.ask(me.conversation(), "tokens=12 delay=0.05 ä 😀 c")
    whole = list(me.frames(asked["stream"]))
    expected, _ = collected(whole)
    # While it is written: broken after every frame. Once it is there: taken up after every frame of the first time.
    asked = me.ask(me.conversation(), "tokens=12 delay=0.05 ä 😀 c")
    text, last_id, event = "", "", ""
    while event != "done":
        last_id, event, data = next(me.frames(asked["stream"], last_id))
        if event == "delta":
            assert data["at"] == len(text)
            text += data["text"]
    assert text == expected
    for id, *_ in whole:
        seen = int(id)
        rest, (event, _) = collected(
            (i, e, d | {"at": d["at"] - seen} if e == "delta" else d) for i, e, d in me.frames(asked["stream"], id)
        )
        assert expected[:seen] + rest == expected and event == "done"


def test_ten_identical_questions_at_once_are_one(me):
    id = me.conversation()
    body = {"client_id": str(uuid.uuid4()), "content": "tokens=5 once", "models": ["scripted"]}
    path = f"/api/conversations/{id}/messages"
    barrier = threading.Barrier(10)

    def post(_):
        barrier.wait()
        return me.http.post(path, json=body)

    with ThreadPoolExecutor(10) as pool:
        responses = list(pool.map(post, range(10)))
    assert sorted(response.status_code for response in responses) == [200] * 9 + [201]
    assert len({response.json()["question"]["id"] for response in responses}) == 1
    assert len({response.json()["answers"][0]["id"] for response in responses}) == 1
    me.answer(responses[0].json())
    assert len(me.thread(id)["messages"]) == 2 and len(me.thread(id)["messages"][1]["siblings"]) == 1


def test_stop_ends_an_answer_wherever_it_is(me):
    for script in ("tokens=500 delay=0.02 x", "loading=60 x", "reading=60 x"):
        id = me.conversation()
        asked = me.ask(id, script)
        answer = asked["answers"][0]["id"]
        time.sleep(0.3)
        begun = time.monotonic()
        assert me.call("POST", f"/api/messages/{answer}/stop")["stopped"]
        _, (event, data) = collected(me.frames(asked["stream"]))
        assert event == "done" and data["message"]["status"] == "stopped" and time.monotonic() - begun < 1
        assert not me.call("POST", f"/api/messages/{answer}/stop")["stopped"], "it has ended"
        assert bool(me.thread(id)["messages"][1]["content"]) == script.startswith("tokens")
        assert me.answer(me.ask(id, "tokens=2 on", parent=answer))["content"] == "on on"


def test_leaving_does_not_stop_an_answer(me):
    id = me.conversation()
    asked = me.ask(id, "tokens=20 delay=0.03 x")
    next(me.frames(asked["stream"]))
    time.sleep(1.2)
    assert me.thread(id)["messages"][1]["status"] == "done"


def test_what_the_engine_refuses_is_told(me):
    for code in ("prompt", "model"):
        answer = me.answer(me.ask(me.conversation(), f"tokens=4 after=2 fail={code} x"))
        assert (answer["status"], answer["error"], answer["content"]) == ("error", code, "x x")
    answer = me.answer(me.ask(me.conversation(), "x", models=["unknown"]))
    assert answer["status"] == "error" and answer["error_message"] == "no model 'unknown'"


def test_the_answer_is_located_in_the_passage(me):
    passage = me.call("POST", "/api/passages", json={"text": "😀 Paris is the capital.", "title": "France"})
    answer = me.answer(me.ask(me.conversation(), "tokens=2 what?", passage=passage["id"]))
    assert answer["content"] == "😀 Paris" and answer["in_passage"] is True and 0 < answer["probability"] < 1
    assert answer["span"] == {"start": 0, "end": 7, "start16": 0, "end16": 8} and answer["kind"] == "qa"
    assert answer["passage"] == passage["id"]
    without = me.answer(me.ask(me.conversation(), "tokens=2 what?", passage=passage["id"], contexts=[False]))
    assert without["span"] is None and without["in_passage"] is None and without["passage"] is None


@settings(deadline=None)
@given(st.text(), st.integers(0, 20), st.integers(1, 20))
def test_both_counts_of_a_span_name_the_same_text(text, start, length):
    text = text.encode("utf-8", "ignore").decode()
    start = min(start, len(text))
    end = min(start + length, len(text))
    span = span_json(text, start, end)
    units = text.encode("utf-16-le")
    assert units[2 * span["start16"] : 2 * span["end16"]].decode("utf-16-le") == text[start:end]


def test_a_passage_is_stored_once_however_it_comes(me):
    first = me.call("POST", "/api/passages", json={"text": "One text.\r\nTwo lines."})
    second = me.call("POST", "/api/passages", files={"file": ("a.txt", "One text.\nTwo lines.".encode("utf-8-sig"))})
    assert first["id"] == second["id"] and first["title"] == "One text."
    assert me.call("GET", f"/api/passages/{first['id']}")["text"] == "One text.\nTwo lines."
    assert "text" not in me.call("GET", "/api/passages")["passages"][0]
    error = me.call("POST", "/api/passages", 400, files={"file": ("a.bin", b"\xff\xfe\x00")})["error"]
    assert error["message"] == "a.bin: not a text file in UTF-8"
    long = me.call("POST", "/api/passages", json={"text": "a word " * 50})
    assert long["title"] == "a word " * 8 + "a…"
    me.call("POST", "/api/passages", 400, json={"text": ""})
    me.call("POST", "/api/passages", 400, json={"text": "x" * 1_000_001})
    me.call("POST", "/api/passages", 413, content=b"x" * (9 * 2**20))
    assert me.http.post("/api/passages", content=b"x" * (65 * 2**20)).status_code == 413


def test_with_and_without_the_passage_side_by_side(me):
    id = me.conversation()
    passage = me.call("POST", "/api/passages", json={"text": "Lima is the capital of Peru."})["id"]
    asked = me.ask(id, "tokens=1 what?", passage=passage, contexts=[True, False], golds=["Lima"], kind="qa")
    with_it, without = me.answers(asked)
    assert with_it["content"] == "Lima" and with_it["scores"] == {"exact": 100.0, "f1": 100.0}
    assert without["content"] == "what?" and without["scores"] == {"exact": 0.0, "f1": 0.0}
    assert with_it["comparison"] == without["comparison"] == asked["question"]["id"]
    shown = me.thread(id)["messages"]
    assert len(shown) == 2 and [c["id"] for c in shown[1]["columns"]] == [with_it["id"], without["id"]]
    frames = list(me.frames(asked["stream"]))
    assert {data["g"] for _, event, data in frames if event == "done"} == {with_it["id"], without["id"]}
    assert frames[-1][0] == "4-5", "one cursor for each answer"
    me.ask(id, "x", 400, models=[f"m{i}" for i in range(5)], contexts=[True, False])


def test_a_draft_is_counted_before_it_is_sent(me):
    passage = me.call("POST", "/api/passages", json={"text": "word " * 5000})["id"]
    counted = me.call("POST", "/api/count", json={"content": "a b c", "model": "scripted", "passage": passage})
    assert counted == {"prompt_tokens": 4096, "limit": 4096, "cut_tokens": 907, "windows": 1}
    counted = me.call("POST", "/api/count", json={"content": "a b c", "model": "scripted", "kind": "chat"})
    assert counted["prompt_tokens"] == 3 and counted["cut_tokens"] == 0


def test_feedback_is_checked_changed_and_taken_back(me):
    passage = me.call("POST", "/api/passages", json={"text": "Oslo lies in Norway."})["id"]
    answer = me.answer(me.ask(me.conversation(), "where?", passage=passage))
    path = f"/api/messages/{answer['id']}/feedback"
    assert me.call("PUT", path, json={"good": True})["good"] is True
    given = me.call("PUT", path, json={"good": False, "span": [13, 19], "note": "the country"})
    assert given == {"good": False, "span": {"start": 13, "end": 19}, "no_answer": False, "note": "the country"}
    assert me.call("PUT", path, json={"good": False, "no_answer": True})["span"] is None
    for wrong in ({"span": [5, 21]}, {"span": [3, 3]}, {"span": [-1, 3]}, {"span": [0, 1], "no_answer": True}):
        me.call("PUT", path, 400, json={"good": False} | wrong)
    me.call("DELETE", path, 204)
    me.call("PUT", f"/api/messages/{answer['parent']}/feedback", 404, json={"good": True})


def test_models_are_loaded_and_unloaded(me):
    assert me.call("POST", "/api/models/load", json={"model": "scripted"})["models"][0]["state"] == "loaded"
    assert me.call("GET", "/api/models")["models"][0]["name"] == "scripted"
    assert me.call("POST", "/api/models/load", 422, json={"model": "none"})["error"]["message"] == "no model 'none'"
    assert me.call("GET", "/api/status")["saved"] is True


def test_the_pages_are_there(me):
    id = me.conversation(title="shown")
    me.answer(me.ask(id, "tokens=2 *hello*"))
    for path in ("/", f"/c/{id}/", "/sets/", "/settings/"):
        response = me.http.get(path)
        assert response.status_code == 200 and "<style" not in response.text and "onclick" not in response.text
    assert "<em>hello</em>" in me.http.get(f"/c/{id}/").text
    assert me.http.get(f"/c/{uuid.uuid4()}/").status_code == 404
