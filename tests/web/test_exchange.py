import json
import uuid

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
    me.answer(me.call("POST", f"/api/messages/{first['id']}/again", json={"client_id": str(uuid.uuid4())}))
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
        assert counted == {"conversations": 3, "messages": 10, "passages": 1}
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(version=2), "not a file of conversations: Invalid enum value 2 - at `$.version`"),
        (lambda f: f.pop("passages"), "not a file of conversations: Object missing required field `passages`"),
        (lambda f: f.update(passages=[]), "passage "),
        (lambda f: f["conversations"][0]["messages"].pop(0), "does not stand before it"),
        (lambda f: f["conversations"][0]["messages"][1].pop("generation"), "says how it came about"),
    ],
)
def test_a_wrong_file_is_refused_whole(full, change, message):
    me, id = full
    file = json.loads(exported(me, f"/api/conversations/{id}/export?format=json"))
    file["conversations"][0]["title"], file["conversations"][0]["updated"] = "Wrong", "2200-01-01T00:00:00+00:00"
    change(file)
    before = exported(me)
    assert message in me.call("POST", "/api/import", 400, content=json.dumps(file))["error"]["message"]
    assert exported(me) == before
