import json
import os
import subprocess
import sys
import time
from collections import defaultdict

import pytest

from babl.data.fictional import fictional_corpus
from babl.data.squad import load_squad


@pytest.fixture(scope="module")
def own(tmp_path_factory, database, serving):
    with serving(tmp_path_factory.mktemp("own"), database()) as server:
        yield server


@pytest.fixture(scope="module")
def me(own):
    return own.person()


def finished(me, run):
    deadline = time.monotonic() + 20
    while (run := me.call("GET", f"/api/runs/{run['id']}"))["status"] in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return run


def test_a_question_set_is_run_and_two_runs_are_compared(me):
    context = "tokens are many. Rome is old."
    qas = [
        {"id": "a", "question": "tokens=1 delay=0 what?", "answers": [{"text": "tokens", "answer_start": 0}]},
        {"id": "b", "question": "tokens=1 delay=0 Rome", "answers": [{"text": "Rome", "answer_start": 17}]},
        {"id": "c", "question": "tokens=2 delay=0 x", "answers": [{"text": "Rome is", "answer_start": 17}]},
    ]
    qas += [qas[0] | {"id": f"q{i}"} for i in range(20)]
    file = json.dumps({"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": context, "qas": qas}]}]})
    made = me.call("POST", "/api/sets?name=small.json", 201, content=file)
    again = me.call("POST", "/api/sets", 201, files={"file": ("same.json", file.encode())})
    assert made["id"] == again["id"] and (made["name"], made["questions"]) == ("small.json", 23)
    path = f"/api/sets/{made['id']}"
    a = finished(me, me.call("POST", f"{path}/runs", 201, json={"model": "scripted", "with_context": False}))
    b = finished(me, me.call("POST", f"{path}/runs", 201, json={"model": "scripted"}))
    assert (a["status"], a["answered"]) == (b["status"], b["answered"]) == ("done", 23)
    assert a["exact"] == pytest.approx(100 / 23) and b["exact"] == pytest.approx(100 * 21 / 23)
    assert b["weights"] == "scripted"
    found = me.call("GET", f"{path}/difference?a={a['id']}&b={b['id']}")
    assert (found["fixed"], found["broke"]) == (21, 1)
    rows = {row["qid"]: row for row in found["questions"]}
    assert list(rows)[:3] == ["a", "b", "c"]
    assert (rows["a"]["a"]["text"], rows["a"]["b"]["text"], rows["a"]["exact"]) == ("what?", "tokens", 100)
    assert rows["b"]["exact"] == -100 and rows["c"]["exact"] == 0 and rows["b"]["golds"] == ["Rome"]
    failed = finished(me, me.call("POST", f"{path}/runs", json={"model": "other"}))
    assert (failed["status"], failed["error_message"]) == ("error", "no model 'other'")
    assert len(me.call("GET", path)["runs"]) == 3
    assert me.call("POST", "/api/sets", 400, content='{"data": 3}')["error"]["message"].startswith(
        "upload: data: expected"
    )


def small_set(me, name, *rows):
    paragraphs = [
        {"context": context, "qas": [{"id": f"{name}{i}", "question": question, "answers": []}]}
        for i, (context, question) in enumerate(rows)
    ]
    file = json.dumps({"version": "v2.0", "data": [{"title": name, "paragraphs": paragraphs}]})
    return me.call("POST", f"/api/sets?name={name}", 201, content=file)


def titles(me):
    return sorted(passage["title"] for passage in me.call("GET", "/api/passages")["passages"])


def test_a_question_that_is_too_long_is_skipped_and_counted_and_the_others_are_answered(me):
    rows = [(f"Mills of {i}.", f"{'fail=prompt ' * (i == 2)}tokens=1 delay=0 x{i}") for i in range(20)]
    made = small_set(me, "long", *rows)
    run = finished(me, me.call("POST", f"/api/sets/{made['id']}/runs", json={"model": "scripted"}))
    assert (run["status"], run["answered"], run["skipped"]) == ("done", 20, 1)
    assert run["exact"] == pytest.approx(100 / 20), "nothing is right where there is no answer"
    response = me.http.get(f"/api/runs/{run['id']}/predictions")
    assert 'filename="scripted-with.json"' in response.headers["content-disposition"]
    assert list(response.json()) == [f"long{i}" for i in range(20)] and response.json()["long2"] == ""
    me.call("DELETE", f"/api/sets/{made['id']}", 204)


def test_predictions_of_two_runs_are_what_compare_reads(me, tmp_path):
    titles = [f"T{i}" for i in range(6)]
    tree = {"version": "1.1", "data": []}
    for title in titles:
        qa = {"id": title, "question": "tokens=1 delay=0 what?", "answers": [{"text": "tokens", "answer_start": 0}]}
        tree["data"].append({"title": title, "paragraphs": [{"context": f"tokens of {title}", "qas": [qa]}]})
    made = me.call("POST", "/api/sets?name=c", 201, content=json.dumps(tree))
    (tmp_path / "data.json").write_text(json.dumps(tree))
    for name, shown in (("a", False), ("b", True)):
        asked = {"model": "scripted", "with_context": shown}
        run = finished(me, me.call("POST", f"/api/sets/{made['id']}/runs", json=asked))
        (tmp_path / f"{name}.json").write_text(me.http.get(f"/api/runs/{run['id']}/predictions").text)
    command = [sys.executable, "-m", "babl.cli", "compare", "data.json", "a.json", "b.json", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["exact"]["a"], found["exact"]["b"]) == (0, 100)


def test_passages_of_a_set_go_with_it_and_bury_no_others(me):
    other = small_set(me, "other", ("Both sets have this.", "q"))
    own = me.call("POST", "/api/passages", 201, json={"text": "Mine alone.", "title": "mine"})
    used = me.call("POST", "/api/passages", 201, json={"text": "Asked about.", "title": "used"})
    made = small_set(me, "gone", ("Of the set alone.", "q"), ("Both sets have this.", "q"), ("Asked about.", "q"))
    conversation = me.conversation()
    me.answer(me.ask(conversation, "tokens=1 delay=0 x", passage=used["id"]))
    assert set(titles(me)) >= {"mine", "used"} and not {"gone", "other"} & set(titles(me))
    me.call("DELETE", f"/api/passages/{used['id']}", 409)
    ids = {each["title"]: each["id"] for each in json.loads(me.http.get("/api/export").text)["passages"]}
    me.call("DELETE", f"/api/sets/{made['id']}", 204)
    me.call("GET", f"/api/passages/{ids['gone']}", 404)
    assert me.call("GET", f"/api/passages/{ids['other']}")["text"] == "Both sets have this."
    assert me.call("GET", f"/api/passages/{used['id']}")["text"] == "Asked about."
    me.call("DELETE", f"/api/passages/{own['id']}", 204)
    assert "mine" not in titles(me)
    me.call("DELETE", f"/api/sets/{other['id']}", 204)
    me.call("GET", f"/api/passages/{ids['other']}", 404)


def test_a_run_is_stopped_and_goes_on(me):
    qas = [
        {"id": str(i), "question": f"tokens=1 delay=0.3 {i}", "answers": [{"text": "x", "answer_start": 0}]}
        for i in range(24)
    ]
    file = json.dumps({"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "x y", "qas": qas}]}]})
    made = me.call("POST", "/api/sets", content=file)
    run = me.call("POST", f"/api/sets/{made['id']}/runs", json={"model": "scripted"})
    me.call("POST", f"/api/runs/{run['id']}/resume", 409)
    time.sleep(0.5)
    stopped = me.call("POST", f"/api/runs/{run['id']}/stop")
    assert stopped["status"] == "stopped" and 0 < stopped["answered"] < 24
    assert me.call("GET", f"/api/runs/{run['id']}") == stopped
    me.call("POST", f"/api/runs/{run['id']}/resume")
    done = finished(me, run)
    assert (done["status"], done["answered"], done["exact"]) == ("done", 24, 100)
    me.call("DELETE", f"/api/sets/{made['id']}", 204)
    me.call("GET", f"/api/runs/{run['id']}", 404)


def export(own, *arguments):
    command = [sys.executable, "-m", "babl.cli", "feedback", "export", *map(str, arguments), "--data", str(own.data)]
    return subprocess.run(command, env=os.environ | own.environment, capture_output=True, text=True)


def test_what_people_say_becomes_questions_to_train_on(own, me, tmp_path):
    out = tmp_path / "corrections.json"
    result = export(own, out)
    assert result.returncode == 2 and "no answer about a passage has been judged" in result.stderr
    said = defaultdict(dict)
    examples = load_tree(fictional_corpus(8, 2)[0])
    for i, (context, question, start, text) in enumerate(examples):
        passage = me.call("POST", "/api/passages", json={"text": context})["id"]
        answer = me.answer(me.ask(me.conversation(), f"tokens=2 delay=0 {question}", passage=passage))
        path = f"/api/messages/{answer['id']}/feedback"
        me.call("PUT", path, json={"good": False})  # does not say what is right
        if i % 3 == 0:
            me.call("PUT", path, json={"good": False, "span": [start, start + len(text)]})
            said[context][question] = [text]
        elif i % 3 == 1:
            me.call("PUT", path, json={"good": True})
            said[context][question] = [answer["content"]]
        elif i % 3 == 2 and i < 12:
            me.call("PUT", path, json={"good": False, "no_answer": True})
            said[context][question] = []
    result = export(own, out, "--test-share", "0.3", "--json")
    assert result.returncode == 0, result.stderr
    train, test = load_squad(out), load_squad(tmp_path / "corrections-test.json")
    counted = json.loads(result.stdout)
    assert (counted[str(out)], counted[str(tmp_path / "corrections-test.json")]) == (len(train), len(test))
    assert counted["undecided"] == len(examples) - sum(map(len, said.values())) > 0
    found = defaultdict(dict)
    for example in [*train, *test]:
        found[example.context][example.question.split("delay=0 ")[1]] = [answer.text for answer in example.answers]
    assert found == said
    assert not {e.context for e in train} & {e.context for e in test} and test
    export(own, tmp_path / "again.json", "--test-share", "0.3")
    assert (tmp_path / "again.json").read_bytes() == out.read_bytes(), "a passage keeps its side"
    downloaded = me.http.get("/api/feedback/export?test_share=0.3&part=test")
    assert json.loads(downloaded.content) == json.loads((tmp_path / "corrections-test.json").read_text())
    assert "--test-share is 1.0, expected at least 0 and less than 1" in export(own, out, "--test-share", "1").stderr


def load_tree(tree):
    """Returns (context, question, start, answer) of some questions of a parsed SQuAD file, several of each context."""
    found = []
    for article in tree["data"]:
        for paragraph in article["paragraphs"][:1]:
            for qa in paragraph["qas"][:3]:
                answer = qa["answers"][0]
                found.append((paragraph["context"], qa["question"], answer["answer_start"], answer["text"]))
    return found[:24]


def test_the_last_word_on_a_question_counts(own, me, tmp_path):
    passage = me.call("POST", "/api/passages", json={"text": "The last word counts."})["id"]
    for span in ([4, 8], [9, 13]):
        answer = me.answer(me.ask(me.conversation(), "which word?", passage=passage))
        me.call("PUT", f"/api/messages/{answer['id']}/feedback", json={"good": False, "span": span})
    assert export(own, tmp_path / "out.json").returncode == 0
    (found,) = [e for e in load_squad(tmp_path / "out.json") if e.question == "which word?"]
    assert [answer.text for answer in found.answers] == ["word"]
