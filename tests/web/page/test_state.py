"""The reducer that the page's state goes through, by itself: whatever is cut, doubled or late, the text is the text."""

import random

import pytest

pytestmark = pytest.mark.browser
TEXT = "Ein 🦊 läuft über den Fluß. 👩‍🚀 fliegt."


@pytest.fixture(scope="module")
def reduce(chromium, server):
    """A function that returns the state after actions."""
    page = chromium.new_page()
    page.goto(server.address + "/login/")
    script = """async actions => {
        const { reduce, EMPTY, summary } = await import("/static/js/state.js");
        const state = actions.reduce(reduce, EMPTY);
        return { ...state, summary: summary(state) };
    }"""
    yield lambda *actions: page.evaluate(script, list(actions))
    page.close()


def answer(content="", status="running", id="a", **more):
    return {"id": id, "role": "assistant", "parent": "q", "content": content, "status": status, "columns": []} | more


def snapshot(*messages, more=False, **conversation):
    live = [m["id"] for m in messages if m.get("status") in ("queued", "running")]
    question = {"id": "q", "role": "user", "parent": None, "content": "Who?"}
    whole = {"id": "c", "title": "", "messages": [question, *messages], "more": more, "live": live} | conversation
    return {"type": "snapshot", "snapshot": whole}


def delta(at, text, g="a"):
    return {"type": "delta", "g": g, "at": at, "text": text}


def text_of(state, i=-1):
    return state["messages"][i]["content"]


def test_a_stream_cut_anywhere_and_begun_again_anywhere_before_gives_the_text_once(reduce):
    for cut in range(len(TEXT) + 1):
        for again in {0, cut // 2, cut}:
            state = reduce(snapshot(answer()), delta(0, TEXT[:cut]), delta(again, TEXT[again:]))
            assert text_of(state) == TEXT and not state["gap"]


def test_frames_that_are_doubled_or_overlap_count_once(reduce):
    chance = random.Random(4)
    for _ in range(30):
        actions, at = [snapshot(answer())], 0
        while at < len(TEXT):
            begin = chance.randint(0, at)
            end = chance.randint(at, len(TEXT))
            actions += [delta(begin, TEXT[begin:end])] * chance.randint(1, 2)
            at = max(at, end)
        assert text_of(reduce(*actions)) == TEXT


def test_what_is_missing_is_noticed_and_a_snapshot_mends_it(reduce):
    broken = [snapshot(answer()), delta(0, "One "), delta(8, "three")]
    state = reduce(*broken)
    assert state["gap"] and text_of(state) == "One "
    state = reduce(*broken, snapshot(answer("One two ")), delta(8, "three"))
    assert not state["gap"] and text_of(state) == "One two three"


def test_a_snapshot_that_lags_behind_the_stream_takes_nothing_back(reduce):
    state = reduce(snapshot(answer()), delta(0, "One two three"), snapshot(answer("One")))
    assert text_of(state) == "One two three"
    state = reduce(snapshot(answer()), delta(0, "One two"), snapshot(answer("One two!", "done")), delta(0, "One two"))
    assert text_of(state) == "One two!"


def test_columns_have_their_own_texts_and_end_one_by_one(reduce):
    columns = [answer(), answer(id="b")]
    begun = [snapshot(answer(columns=columns)), delta(0, "left"), delta(0, "right", "b")]
    begun[0]["snapshot"]["live"] = ["a", "b"]
    state = reduce(*begun)
    assert [column["content"] for column in state["messages"][-1]["columns"]] == ["left", "right"]
    state = reduce(*begun, {"type": "done", "message": answer("right!", "done", "b")})
    assert list(state["live"]) == ["a"]
    assert [c["status"] for c in state["messages"][-1]["columns"]] == ["running", "done"]


def test_pages_above_stay_when_the_end_is_looked_at_again(reduce):
    above = {"id": "q0", "role": "user", "parent": None, "content": "First?"}
    between = {**answer("First.", "done", "a0"), "parent": "q0"}
    begun = snapshot(answer(), more=True)
    begun["snapshot"]["messages"][0]["parent"] = "a0"
    state = reduce(begun, {"type": "earlier", "messages": [above, between], "more": False}, begun)
    assert [message["id"] for message in state["messages"]] == ["q0", "a0", "q", "a"] and not state["more"]


def test_the_status_line_says_one_thing(reduce):
    def told(**facts):
        return {"type": "state", "g": "a", "saved": True, **facts}

    begun = snapshot(answer())
    assert reduce(begun, told(status="queued", position=2))["summary"] == "Waiting; 2 before this"
    assert reduce(begun, told(status="loading"))["summary"] == "Loading the model"
    reading = told(status="reading", prompt_tokens=700, windows=2)
    assert reduce(begun, reading)["summary"] == "Reading 700 tokens through 2 windows"
    assert reduce(begun, told(status="answering"))["summary"] == "Answering"
    assert reduce(begun, told(status="answering", saved=False))["summary"].startswith("Not saved")
    for status, says in [("done", "Answered"), ("stopped", "Stopped"), ("interrupted", "Interrupted")]:
        assert reduce(snapshot(answer("x", status)))["summary"] == says
