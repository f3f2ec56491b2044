import json
import time
import uuid

import pytest


def titles(person, **query):
    return [each["title"] for each in person.call("GET", "/api/conversations", params=query)["conversations"]]


def test_a_conversation_is_named_archived_thrown_away_and_taken_back(me):
    id = me.conversation(title="Whales and boats")
    path = f"/api/conversations/{id}"
    assert "Whales and boats" in titles(me)
    assert me.call("PATCH", path, json={"title": "Only whales"})["title"] == "Only whales"
    both = me.call("PATCH", path, json={"archived": True, "title": "Only whales"})
    assert both["archived"]
    assert "Only whales" in titles(me, kind="archived") and "Only whales" not in titles(me)
    me.call("PATCH", path, json={"archived": False, "deleted": True})
    assert "Only whales" in titles(me, kind="trash") and "Only whales" not in titles(me)
    assert titles(me, q="whales") == []
    me.call("PATCH", path, json={"deleted": False})
    assert "Only whales" in titles(me)
    assert me.call("DELETE", path, 409)["error"]["message"] == "the conversation is not in the trash"
    me.call("PATCH", path, json={"deleted": True})
    me.call("DELETE", path, 204)
    me.call("GET", path, 404)


def test_settings_are_kept_and_checked(me):
    id = me.conversation()
    change = {"system_prompt": "Be brief.", "model": "scripted", "settings": {"temperature": 0.7, "seed": 3}}
    found = me.call("PATCH", f"/api/conversations/{id}", json=change)
    assert found["settings"]["temperature"] == 0.7 and found["system_prompt"] == "Be brief."
    assert me.thread(id)["settings"]["seed"] == 3
    for wrong in ({"settings": {"temperature": "hot"}}, {"titel": "x"}, {"title": "x" * 201}):
        error = me.call("PATCH", f"/api/conversations/{id}", 400, json=wrong)["error"]
        assert error["code"] == "invalid"
    assert error["message"] == "title has 201 characters, expected 0 to 200"


def test_the_client_may_name_a_conversation_and_make_it_twice(me):
    id = str(uuid.uuid4())
    assert me.conversation(id=id, title="named once") == me.conversation(id=id, title="named once") == id
    assert titles(me, q="named once") == ["named once"]


def test_pages_of_the_list_have_everything_once(own_server):
    me = own_server.person()
    made = [me.conversation(title=f"number {i}") for i in range(120)]
    seen, before = [], {}
    while True:
        page = me.call("GET", "/api/conversations", params=before)
        seen += [each["id"] for each in page["conversations"]]
        if page["next"] is None:
            break
        before = {"before": page["next"]}
    assert seen == made[::-1]
    me.call("GET", "/api/conversations", 400, params={"before": "yesterday"})


def test_search_finds_words_and_their_beginnings(me):
    id = me.conversation(title="Animals")
    me.answer(me.ask(id, "Where does the Quokka live, naïve as it is?"))
    other = me.conversation(title="A quokka's title")
    found = me.call("GET", "/api/conversations", params={"q": "quok"})["conversations"]
    assert {each["id"] for each in found} == {id, other}
    hit = next(each for each in found if each["id"] == id)
    assert "Quokka" in hit["excerpt"] and hit["message"] in [m["id"] for m in me.thread(id)["messages"]]
    assert titles(me, q="quokka nowhere") == []
    assert [
        each["id"]
        for each in me.call("GET", "/api/conversations", params={"q": 'quokka "live" -NOT:*'})["conversations"]
    ] == []
    assert titles(me, q='"*') == []
    me.call("PATCH", f"/api/conversations/{id}", json={"deleted": True})
    me.call("DELETE", f"/api/conversations/{id}", 204)
    assert titles(me, q="quokka live") == []


def test_an_edit_is_a_branch_and_both_can_be_shown(me):
    id = me.conversation()
    first = me.ask(id, "first")
    answer = me.answer(first)
    me.answer(me.ask(id, "second", parent=answer["id"]))
    assert [m["content"] for m in me.thread(id)["messages"] if m["role"] == "user"] == ["first", "second"]
    edited = me.ask(id, "second, edited", parent=answer["id"])
    me.answer(edited)
    shown = me.thread(id)["messages"]
    assert [m["content"] for m in shown if m["role"] == "user"] == ["first", "second, edited"]
    siblings = shown[2]["siblings"]
    assert len(siblings) == 2 and siblings[1] == edited["question"]["id"]
    me.call("PATCH", f"/api/conversations/{id}", json={"leaf": siblings[0]})
    shown = me.thread(id)["messages"]
    assert [m["content"] for m in shown if m["role"] == "user"] == ["first", "second"] and len(shown) == 4


def test_another_answer_stands_beside_the_first(me):
    id = me.conversation()
    first = me.answer(me.ask(id, "again"))
    body = {"client_id": str(uuid.uuid4())}
    path = f"/api/messages/{first['id']}/again"
    second = me.answer(me.call("POST", path, 201, json=body))
    repeated = me.call("POST", path, 200, json=body)
    assert repeated["answers"][0]["id"] == second["id"] != first["id"]
    assert me.thread(id)["messages"][1]["siblings"] == [first["id"], second["id"]]
    assert me.thread(id)["leaf"] == second["id"]


def test_a_question_follows_an_answer_of_its_conversation(me):
    id, other = me.conversation(), me.conversation()
    asked = me.ask(id, "one")
    answer = me.answer(asked)
    for parent in (asked["question"]["id"], str(uuid.uuid4())):
        assert me.ask(id, "two", 409, parent=parent)["error"]["code"] == "conflict"
    me.ask(other, "two", 409, parent=answer["id"])
    me.ask(id, "", 400)
    assert "expected 1 to 100000" in me.ask(id, "x" * 100_001, 400)["error"]["message"]
    assert len(me.thread(id)["messages"]) == 2


@pytest.fixture(scope="module")
def long_life(tmp_path_factory, database, serving):
    """Somebody with 1,000 conversations, one of which has 2,000 messages."""

    def message(i, parent):
        time = f"2026-01-01T00:{i // 60 % 60:02}:{i % 60:02}+00:00"
        row = {"id": str(uuid.UUID(int=(0x7 << 76) + i + 1)), "role": "user", "content": f"line {i}", "created": time}
        if i % 2:
            row |= {"role": "assistant", "generation": {"kind": "chat", "model": "m", "status": "done"}}
        return row | {"parent": parent}

    messages = []
    for i in range(2000):
        messages.append(message(i, messages[-1]["id"] if messages else None))
    now = "2026-01-02T00:00:00+00:00"
    conversations = [
        {"id": str(uuid.uuid4()), "title": f"talk {i}", "created": now, "updated": now, "messages": []}
        for i in range(999)
    ]
    long = {"id": str(uuid.uuid4()), "title": "long", "created": now, "updated": now, "messages": messages}
    conversations.append(long | {"leaf": messages[-1]["id"]})
    file = {"format": "babl-conversations", "version": 1, "passages": [], "conversations": conversations}
    with serving(tmp_path_factory.mktemp("long"), database()) as server:
        me = server.person()
        counted = me.call("POST", "/api/import", content=json.dumps(file), timeout=120)
        assert counted == {"conversations": 1000, "messages": 2000, "passages": 0}
        yield me, long["id"]


def test_long_lists_and_long_conversations_stay_fast(long_life):
    me, id = long_life

    def seconds(path):
        times = []
        for _ in range(3):
            begun = time.monotonic()
            assert me.http.get(path).status_code == 200
            times.append(time.monotonic() - begun)
        return min(times)

    assert seconds("/api/conversations") < 0.3
    assert seconds(f"/api/conversations/{id}") < 0.5
    assert seconds("/api/conversations?q=line") < 0.5
    seen, more, query = [], True, {}
    while more:
        page = me.call("GET", f"/api/conversations/{id}/messages", params=query)
        seen, more = page["messages"] + seen, page["more"]
        query = {"before": seen[0]["id"]}
    assert [m["content"] for m in seen] == [f"line {i}" for i in range(2000)]


def test_titles_are_found_whatever_their_case_and_composition(me):
    for title, query in [("Ölpreis heute", "ölpreis"), ("Cafe\u0301 zu", "CAFÉ"), ("ΣΊΣΥΦΟΣ", "σίσυφος")]:
        id = me.conversation(title=title)
        assert id in [row["id"] for row in me.call("GET", "/api/conversations", params={"q": query})["conversations"]]


def test_nothing_is_asked_in_a_conversation_that_is_in_the_trash(me):
    id = me.conversation()
    answer = me.answer(me.ask(id, "tokens=1 delay=0 once"))
    me.call("PATCH", f"/api/conversations/{id}", json={"deleted": True})
    assert "in the trash" in me.ask(id, "tokens=1 twice", 409)["error"]["message"]
    again = {"client_id": str(uuid.uuid4())}
    assert "in the trash" in me.call("POST", f"/api/messages/{answer['id']}/again", 409, json=again)["error"]["message"]
    assert len(me.thread(id)["messages"]) == 2
    me.call("PATCH", f"/api/conversations/{id}", json={"deleted": False})
    me.answer(me.ask(id, "tokens=1 delay=0 twice", parent=answer["id"]))


def test_a_comparison_is_asked_again_as_a_whole(me):
    passage = me.call("POST", "/api/passages", json={"text": "Rudi bakes bread."})
    id = me.conversation()
    asked = me.ask(id, "tokens=1 delay=0 who?", passage=passage["id"], contexts=[True, False])
    first = me.answers(asked)
    assert [answer["content"] for answer in first] == ["Rudi", "who?"]
    body = {"client_id": str(uuid.uuid4()), "model": "another", "settings": {"max_new_tokens": 5}}
    again = me.call("POST", f"/api/messages/{first[1]['id']}/again", 201, json=body)
    second = me.answers(again)
    assert [(a["content"], a["with_context"], a["model"]) for a in second] == [
        ("Rudi", True, "scripted"), ("who?", False, "scripted")
    ]  # fmt: skip
    shown = me.thread(id)["messages"][-1]
    assert [column["id"] for column in shown["columns"]] == [answer["id"] for answer in second]
    assert len(shown["siblings"]) == 2, "the first comparison, and this one"
    same = me.call("POST", f"/api/messages/{first[0]['id']}/again", 200, json=body)
    assert [answer["id"] for answer in same["answers"]] == [answer["id"] for answer in second]
