import json
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest


@pytest.fixture(scope="module")
def full(own):
    """Somebody who has one of everything that a file can have."""
    me = own.person()
    passage = me.call("POST", "/api/passages", json={"text": "Bern is in Switzerland. 😀", "title": "Bern"})["id"]
    id = me.conversation(title="All of it", system_prompt="Be exact.", settings={"temperature": 0.5})
    asked = me.ask(id, "tokens=1 where?", passage=passage, contexts=[True, False], golds=["Bern"], kind="qa")
    first, second = me.answers(asked)
    me.call("PUT", f"/api/messages/{first['id']}/feedback", json={"good": True, "note": "yes"})
    me.call("PUT", f"/api/messages/{second['id']}/feedback", json={"good": False, "span": [11, 22]})
    me.answer(me.ask(id, "tokens=2 and?", parent=first["id"]))
    me.answer(me.ask(id, "tokens=2 and then? \\u0000", parent=first["id"]))
    me.answers(me.call("POST", f"/api/messages/{first['id']}/again", json={"client_id": str(uuid.uuid4())}))
    broken = me.answer(me.ask(me.conversation(title="Broken"), "tokens=3 after=1 fail=prompt x"))
    assert broken["status"] == "error"
    archived = me.conversation(title="Old")
    me.call("PATCH", f"/api/conversations/{archived}", json={"archived": True})
    return me, id


@pytest.fixture(scope="module")
def own(tmp_path_factory, database, serving):
    with serving(tmp_path_factory.mktemp("own"), database()) as server:
        yield server


def exported(me, path="/api/export"):
    response = me.http.get(path)
    assert response.headers["content-disposition"].startswith("attachment")
    return response.content


def test_a_file_brings_everything_to_another_server_and_twice_changes_nothing(full, tmp_path, serving):
    me, id = full
    file = exported(me)
    assert me.call("POST", "/api/import", content=file) == {"conversations": 0, "messages": 0, "passages": 0}
    assert exported(me) == file, "what is there already is not changed"
    with serving(tmp_path / "other", {}) as other:
        you = other.person()
        counted = you.call("POST", "/api/import", files={"file": ("babl.json", file)})
        tree = json.loads(file)
        assert counted == {"conversations": 3, "messages": 11, "passages": 1}
        copy = json.loads(exported(you))
        assert copy["conversations"] == tree["conversations"], "trees, branches, times, scores, feedback"
        assert [p["text"] for p in copy["passages"]] == [p["text"] for p in tree["passages"]]
        assert you.call("POST", "/api/import", content=file) == {"conversations": 0, "messages": 0, "passages": 0}
        assert json.loads(exported(you)) == copy
        mine, yours = me.thread(id), you.thread(id)
        for thread in (mine, yours):  # a passage has another id elsewhere
            for message in thread["messages"]:
                message.pop("passage")
                [column.pop("passage") for column in message["columns"]]
        assert mine["messages"] == yours["messages"]


def test_what_changed_later_counts(full):
    me, id = full
    file = json.loads(exported(me, f"/api/conversations/{id}/export?format=json"))
    (row,) = file["conversations"]
    assert row["id"] == id and len(file["passages"]) == 1
    row["title"], row["updated"] = "Changed elsewhere", "2100-01-01T00:00:00+00:00"
    me.call("POST", "/api/import", content=json.dumps(file))
    assert me.thread(id)["title"] == "Changed elsewhere"
    row["title"], row["updated"] = "Changed long ago", "2000-01-01T00:00:00+00:00"
    me.call("POST", "/api/import", content=json.dumps(file))
    assert me.thread(id)["title"] == "Changed elsewhere"


def test_markdown_can_be_read(full):
    me, id = full
    text = exported(me, f"/api/conversations/{id}/export?format=md").decode()
    assert "**System:** Be exact." in text and "> Bern is in Switzerland. 😀" in text
    assert "**You:** tokens=1 where?" in text and "**scripted**: Bern" in text


def _settings(file, **settings):
    file["conversations"][0]["settings"] = settings


def _answer(file):
    return file["conversations"][0]["messages"][1]


def _judged(**how):
    return {"good": False, "updated": "2026-01-01T00:00:00+00:00"} | how


def _plain(id, messages=()):
    now = "2026-01-01T00:00:00+00:00"
    return {"id": id, "title": "Plain", "created": now, "updated": now, "messages": list(messages)}


def _talk(id, words=5):
    """Returns a conversation of a question and an answer, as a file has it."""
    now, asked = "2026-01-01T00:00:00+00:00", str(uuid.uuid4())
    how = {"kind": "chat", "model": "scripted", "status": "done", "settings": {"temperature": 0.5}}
    question = {"id": asked, "role": "user", "content": "who? " * words, "created": now}
    answer = {"id": str(uuid.uuid4()), "role": "assistant", "content": "me " * words, "created": now}
    return _plain(id, [question, answer | {"parent": asked, "generation": how}])


def _file(conversations):
    return json.dumps({"format": "babl-conversations", "version": 1, "passages": [], "conversations": conversations})


def test_json_nested_deeply_is_refused(full):
    me, _ = full
    deep = "[" * 5000 + "]" * 5000
    file = _file([_plain(str(uuid.uuid4()))]).replace('"messages"', f'"settings": {{"a": {deep}}}, "messages"')
    for method, path, content in (
        ("POST", "/api/import", file),
        ("POST", "/api/conversations", f'{{"settings": {deep}}}'),
        ("POST", "/api/conversations", f'{{"settings": {{"stop": {deep}}}}}'),
        ("POST", "/api/count", f'{{"unknown": {deep}}}'),
    ):
        me.call(method, path, 400, content=content)


def test_others_are_served_while_a_long_file_is_imported(own):
    me, other = own.person(), own.person()
    file = _file([_talk(str(uuid.uuid4())) for _ in range(250)])
    with ThreadPoolExecutor(1) as pool:
        importing, served = pool.submit(me.call, "POST", "/api/import", content=file), 0
        while not importing.done():
            other.conversation(title="meanwhile")
            served += not importing.done()
        assert importing.result() == {"conversations": 250, "messages": 500, "passages": 0}
    assert served >= 5


def _two_questions(file):
    question = file["conversations"][0]["messages"][0]
    file["conversations"][0]["messages"].append(question | {"id": str(uuid.uuid4()), "parent": question["id"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(version=2), "not a file of conversations: Invalid enum value 2 - at `$.version`"),
        (lambda f: f.pop("passages"), "not a file of conversations: Object missing required field `passages`"),
        (lambda f: f.update(passages=[]), "passage "),
        (lambda f: f["conversations"][0]["messages"].pop(0), "does not come before it"),
        (
            lambda f: f["conversations"][0]["messages"][1].pop("generation"),
            "needs a question before it and a generation",
        ),
        (lambda f: _settings(f, temperature="hot"), "settings: Expected `float`, got `str` - at `$.temperature`"),
        (lambda f: _settings(f, seed=2**64), "seed is 18446744073709551616, expected 0 to 9223372036854775807"),
        (lambda f: _settings(f, unknown=1), "settings: Object contains unknown field `unknown`"),
        (lambda f: _answer(f)["generation"].update(settings={"stop": "abc"}), "settings: Expected `array`"),
        (lambda f: _answer(f)["generation"].update(tokens=2**70), "Expected `int` <= 2147483647"),
        (lambda f: _answer(f)["generation"].update(span_start=-1), "Expected `int` >= 0"),
        (lambda f: _answer(f)["generation"].update(weights="w" * 65), "Expected `str` of length <= 64"),
        (lambda f: _answer(f).update(feedback=_judged(right_start=5, right_end=2)), "is [5, 2)"),
        (lambda f: f["conversations"][0].update(model="m" * 201), "Expected `str` of length <= 200"),
        (lambda f: f["conversations"][0].update(created="2026-01-01T00:00:00"), "with a timezone component"),
        (lambda f: f["conversations"][0].update(created="0001-01-01T00:00:00+23:59"), "created is in the year 1"),
        (lambda f: f["conversations"][0].update(leaf=str(uuid.UUID(int=7))), "none of the conversation's messages"),
        (lambda f: f["conversations"].append(f["conversations"][0]), "occurs twice in the file"),
        (lambda f: f["passages"][0].update(text=""), "the passage has 0 characters"),
        (lambda f: _two_questions(f), "and both are of the user"),
    ],
)
def test_a_wrong_file_is_refused_whole(full, change, message):
    me, id = full
    file = json.loads(exported(me, f"/api/conversations/{id}/export?format=json"))
    file["conversations"][0]["title"], file["conversations"][0]["updated"] = "Wrong", "2200-01-01T00:00:00+00:00"
    change(file)
    file["conversations"].append(_plain(str(uuid.uuid4())))
    before = exported(me)
    said = me.call("POST", "/api/import", 400, content=json.dumps(file))["error"]["message"]
    assert message in said and "\n" not in said
    assert exported(me) == before, "what is right in the file is not stored either"
