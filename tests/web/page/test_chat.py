"""Conversations, as somebody has them in a browser."""

import json
import re
import time

import pytest

pytestmark = pytest.mark.browser


def test_a_question_is_answered_and_still_there_after_a_reload(tab):
    tab.ask("tokens=4 one two three")
    assert tab.answers == ["one two three one"]
    tab.expect(tab.page.locator(".facts")).to_contain_text(re.compile(r"4 tokens · [\d.]+ tokens/s"))
    tab.expect(tab.page.locator("#list [aria-current=page]")).to_contain_text("tokens=4 one two three")
    tab.page.reload()
    tab.says("Answered")
    assert tab.answers == ["one two three one"]


def test_stop_ends_the_answer_and_keeps_what_there_is(tab):
    tab.send("tokens=900 delay=0.02 far away")
    tab.expect(tab.page.locator(".said.live")).to_contain_text("far away far")
    tab.says("Answering")
    tab.page.click("#stop")
    tab.says("Stopped")
    kept = tab.answers
    tab.page.reload()
    tab.says("Stopped")
    assert tab.answers == kept and kept[0].startswith("far away far")
    tab.send("tokens=900 delay=0.02 again")
    tab.expect(tab.page.locator(".said.live")).to_contain_text("again again")
    tab.page.keyboard.press("Escape")
    tab.says("Stopped")


def test_the_pace_is_told_in_tokens_while_an_answer_is_written(tab):
    tab.send("tokens=900 delay=0.1 far away")
    line = tab.page.locator(".facts")
    tab.expect(line).to_contain_text("tokens/s")
    time.sleep(3)
    shown = "[...document.querySelectorAll('.said.live, .facts')].map((each) => each.textContent)"
    words, told = tab.page.evaluate(shown)
    tokens, pace = re.fullmatch(r"(\d+) tokens · ([\d.]+) tokens/s", told).groups()
    assert int(tokens) == len(words.split()), "each word that is scripted is a token"
    assert 1 < float(pace) <= 11, "the script leaves 0.1 seconds before each"
    tab.page.reload()
    tab.expect(line).to_have_text(re.compile(r"\d{2} tokens · [\d.]+ tokens/s"))
    tab.page.click("#stop")
    tab.says("Stopped")


def test_stop_works_before_the_first_word(tab):
    tab.send("reading=30 never")
    tab.expect(tab.page.locator("#status")).to_contain_text("Reading")
    tab.page.click("#stop")
    tab.says("Stopped")


def test_a_reload_and_a_second_tab_show_the_same_running_answer(tab, open_tab):
    words = " ".join(f"w{i}" for i in range(90))
    tab.send(f"tokens=90 delay=0.03 {words}")
    tab.expect(tab.page.locator(".said.live")).to_contain_text("w5")
    other = open_tab(beside=tab).visit(f"/c/{tab.id}/")
    tab.page.reload()
    other.says("Answering")
    for each in (tab, other):
        each.says("Answered")
        assert each.answers == [words]


def test_twelve_tabs_of_one_browser_stream_and_stop(tab, open_tab):
    tabs = [tab, *(open_tab(beside=tab).visit("/").ready() for _ in range(11))]
    for i, each in enumerate(tabs):
        each.send(f"tokens=600 delay=0.2 tab{i}")
    for i, each in enumerate(tabs):
        each.expect(each.page.locator(".said.live")).to_contain_text(f"tab{i} tab{i} tab{i}")
    tabs[0].page.keyboard.press("Escape")
    tabs[0].says("Stopped")
    address = tabs[1].page.url
    tabs[1].page.close()  # the stream belongs to no tab
    for each in tabs[2:]:
        words = len(each.page.locator(".said.live").inner_text().split())
        each.expect(each.page.locator(".said.live")).to_contain_text(re.compile(rf"(\S+\s+){{{words + 2}}}"))
        each.page.keyboard.press("Escape")
        each.says("Stopped")
    tab.page.goto(address)  # the answer of the tab that is closed goes on
    tab.says("Answering")
    tab.page.click("#stop")
    tab.says("Stopped")


def test_an_edit_is_a_branch_and_so_is_another_answer(tab):
    tab.ask("tokens=2 first thought")
    tab.ask("tokens=2 and then")
    tab.page.locator(".turn.user").first.hover()
    tab.page.locator("[aria-label='Edit and ask as a new branch']").first.click()
    tab.expect(tab.page.locator("#content")).to_have_value("tokens=2 first thought")
    tab.page.fill("#content", "tokens=2 second thought")
    tab.page.press("#content", "Enter")
    tab.expect(tab.page.locator(".turn.assistant .said")).to_have_text(["second thought"])
    branches = tab.page.locator(".turn.user .branches")
    tab.expect(branches).to_have_text("2 / 2")
    tab.page.click("[aria-label='Previous branch']")
    tab.expect(tab.page.locator(".turn.assistant .said")).to_have_text(["first thought", "and then"])
    tab.page.locator("[aria-label='Answer again']").last.click()
    tab.expect(tab.page.locator(".turn.assistant .branches")).to_have_text("2 / 2")
    tab.key("[")
    tab.expect(tab.page.locator(".turn.assistant .branches")).to_have_text("1 / 2")
    tab.page.reload()
    tab.expect(tab.page.locator(".turn.assistant .branches")).to_have_text("1 / 2")


def test_conversations_are_found_renamed_archived_and_deleted_with_a_way_back(tab):
    tab.ask("tokens=1 heliotrope")
    tab.new().ask("tokens=1 chrysoprase")
    wanted = tab.id
    tab.new().ask("tokens=1 lapislazuli")
    page = tab.page
    page.fill("#search", "chrysop")
    tab.expect(page.locator("#list li")).to_have_count(1)
    tab.expect(page.locator("#list mark").first).to_have_text("chrysop")
    page.click("#list a")
    tab.expect(page.locator(".turn.user .said")).to_have_text("tokens=1 chrysoprase")
    assert tab.id == wanted

    page.click("#conversation-menu")
    page.click("[role=menuitem]:has-text('Rename')")
    page.fill("#rename-title", "Green stones")
    page.press("#rename-title", "Enter")
    tab.expect(page.locator("#title")).to_have_text("Green stones")
    page.fill("#search", "Green st")
    tab.expect(page.locator("#list a")).to_have_text(re.compile("Green stones"))

    def choose(what):
        page.click("#list li:has-text('Green stones') button")
        page.click(f"[role=menuitem]:text-is('{what}')")

    choose("Archive")
    page.click("[data-list=archived]")
    tab.expect(page.locator("#list a")).to_have_count(1)
    page.click(".toast button")
    tab.expect(page.locator("#list a")).to_have_count(0)
    page.click("[data-list=active]")
    choose("Delete")
    tab.expect(page.locator("#list")).not_to_contain_text("Green stones")
    tab.expect(page.locator("#welcome")).to_be_visible()
    page.click(".toast button:text-is('Undo')")
    tab.expect(page.locator("#list")).to_contain_text("Green stones")
    choose("Delete")
    page.click("[data-list=trash]")
    choose("Delete permanently")
    page.click("#confirm [value=yes]")
    tab.expect(page.locator("#list")).not_to_contain_text("Green stones")


def test_a_search_leads_to_a_message_in_another_branch(tab):
    tab.ask("tokens=1 malachite")
    tab.page.locator("[aria-label='Edit and ask as a new branch']").click()
    tab.page.fill("#content", "tokens=1 azurite")
    tab.page.press("#content", "Enter")
    tab.expect(tab.page.locator(".turn.user .branches")).to_have_text("2 / 2")
    tab.says("Answered")
    tab.page.fill("#search", "malachite")
    tab.page.locator("#list a:has(mark)").click()
    tab.expect(tab.page.locator(".turn.user .said")).to_have_text("tokens=1 malachite")


def test_a_long_conversation_opens_at_its_end_and_pages_upward(tab, server):
    me = server.person()
    conversation = me.conversation(title="Long")
    parent = None
    for i in range(30):
        asked = me.ask(conversation, f"tokens=1 delay=0 m{i}", parent=parent)
        parent = me.answer(asked)["id"]
    tab.visit(f"/c/{conversation}/")
    tab.expect(tab.page.locator(".turn.user")).to_have_count(20)
    tab.expect(tab.page.locator(".turn").last).to_be_in_viewport()
    tab.page.locator("#earlier").evaluate("button => button.click()")
    tab.expect(tab.page.locator(".turn.user")).to_have_count(30)
    tab.expect(tab.page.locator("#earlier")).to_be_hidden()
    assert tab.page.locator(".turn.user .said").first.text_content() == "tokens=1 delay=0 m0"


def test_what_is_written_survives_until_the_server_has_it_and_is_sent_once(tab):
    tab.expected = ["Failed to load resource"]
    tab.page.fill("#content", "tokens=2 not lost")
    tab.page.reload()
    tab.ready()
    tab.expect(tab.page.locator("#content")).to_have_value("tokens=2 not lost")

    def lose_the_answer(route):
        route.fetch()  # the server has it, the page does not know
        route.abort()

    tab.page.route("**/messages", lose_the_answer, times=1)
    tab.page.press("#content", "Enter")
    tab.says("Not sent. What you wrote is still here.")
    tab.expect(tab.page.locator("#content")).to_have_value("tokens=2 not lost")
    tab.page.press("#content", "Enter")
    tab.says("Answered")
    assert tab.page.locator(".turn.user .said").all_text_contents() == ["tokens=2 not lost"]
    tab.expect(tab.page.locator("#content")).to_have_value("")
    assert len(tab.api(f"/api/conversations/{tab.id}")["messages"][0]["siblings"]) == 1


def test_a_conversation_deleted_in_another_tab_takes_no_question_and_loses_none(tab, open_tab):
    tab.ask("tokens=1 first")
    other = open_tab(beside=tab).visit(f"/c/{tab.id}/").says("Answered")
    path = f"/api/conversations/{tab.id}"
    token = tab.page.get_attribute("meta[name=csrf-token]", "content")
    how = {"headers": {"X-CSRFToken": token}, "data": {"deleted": True}}
    assert tab.page.request.patch(tab.server.address + path, **how).ok  # as from another browser: no tab is told
    other.expected = ["409"]
    other.page.fill("#content", "tokens=1 second")
    other.page.press("#content", "Enter")
    other.says("Not sent. What you wrote is still here.")
    other.expect(other.page.locator("#in-trash")).to_be_visible()
    assert len(other.api(path)["messages"]) == 2
    other.page.click("#take-back")
    other.expect(other.page.locator("#in-trash")).to_be_hidden()
    other.page.press("#content", "Enter")
    other.says("Answered")
    tab.page.click("#conversation-menu")
    tab.page.click("[role=menuitem]:text-is('Delete')")
    other.expect(other.page.locator("#in-trash")).to_be_visible()  # this browser's tabs tell each other
    other.page.fill("#content", "begun here")
    tab.page.click("[data-list=trash]")
    tab.page.locator(f"#list li:has(a[href='/c/{other.id}/']) button").click()
    tab.page.click("[role=menuitem]:text-is('Delete permanently')")
    other.expected.append("404")
    tab.page.click("#confirm [value=yes]")
    other.expect(other.page.locator("#welcome")).to_be_visible()
    other.expect(other.page.locator("#content")).to_have_value("begun here")


def test_what_an_input_method_composes_is_not_sent_by_the_key_that_ends_it(tab):
    page = tab.page
    page.focus("#content")
    keyboard = page.context.new_cdp_session(page)
    keyboard.send("Input.imeSetComposition", {"text": "にほん", "selectionStart": 3, "selectionEnd": 3})
    key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}
    keyboard.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **key})
    # As Safari tells it: the composition is over already, and only the code says that the key belonged to it.
    page.locator("#content").dispatch_event("keydown", {"key": "Enter", "keyCode": 229})
    keyboard.send("Input.insertText", {"text": "日本"})
    tab.expect(page.locator("#content")).to_have_value("日本")
    assert page.locator(".turn.user").count() == 0
    page.press("#content", "Enter")
    tab.says("Answered")
    assert page.locator(".turn.user .said").all_text_contents() == ["日本"]


def test_enter_on_a_phone_is_a_new_line(open_tab):
    tab = open_tab(has_touch=True, is_mobile=True)
    tab.page.tap("#content")
    tab.page.keyboard.type("tokens=2 one")
    tab.page.keyboard.press("Enter")
    tab.page.keyboard.type("two")
    tab.expect(tab.page.locator("#content")).to_have_value("tokens=2 one\ntwo")
    tab.page.tap("#send")
    tab.says("Answered")
    assert tab.answers == ["one two"]


def test_a_draft_goes_with_its_user(open_tab):
    tab = open_tab()
    tab.expected = ["401"]  # of the login page
    tab.page.fill("#content", "a secret that is not sent")
    tab.page.reload()
    tab.expect(tab.page.locator("#content")).to_have_value("a secret that is not sent")
    drafts = "Object.keys(localStorage).filter(name => name.startsWith('babl:draft:'))"
    assert tab.page.evaluate(drafts) == ["babl:draft:1:new"]
    tab.visit("/settings/").page.click("text=Log out")
    tab.expect(tab.page.locator("main.login")).to_be_visible()
    assert tab.page.evaluate(drafts) == []


def test_a_question_on_its_way_disturbs_no_other_conversation(tab):
    tab.ask("tokens=1 here")
    here = tab.id
    tab.new().ask("tokens=1 there")
    there, held = tab.id, []
    tab.page.route("**/messages", lambda route: held.append(route), times=1)
    tab.page.fill("#content", "tokens=1 late")
    tab.page.press("#content", "Enter")
    tab.says("Sending")
    tab.page.click(f"#list a[href='/c/{here}/']")
    tab.expect(tab.page.locator(".turn.user .said")).to_have_text("tokens=1 here")
    with tab.page.expect_response("**/messages"):
        held[0].continue_()
    tab.expect(tab.page.locator("#content")).to_be_editable()
    tab.expect(tab.page.locator("#content")).to_have_value("")
    assert tab.id == here and tab.page.locator(".turn.user").count() == 1
    tab.visit(f"/c/{there}/").says("Answered")
    tab.expect(tab.page.locator(".turn.user")).to_have_count(2)
    tab.expect(tab.page.locator("#content")).to_have_value("")


def test_what_the_server_cannot_store_stays_on_the_page(tab):
    tab.expected = ["Failed to load resource"]
    error = {"error": {"code": "not_saved", "message": "the server could not store this; is its disk full?"}}
    tab.page.route("**/messages", lambda route: route.fulfill(status=507, json=error), times=1)
    tab.page.fill("#content", "tokens=1 precious")
    tab.page.press("#content", "Enter")
    tab.says("Not saved. What you wrote is still here.")
    tab.expect(tab.page.locator(".toast")).to_contain_text("is its disk full?")
    tab.page.press("#content", "Enter")
    tab.says("Answered")


def test_a_server_that_is_killed_and_comes_back_shows_what_there_was(open_tab, own_server):
    tab = open_tab(of=own_server)
    tab.expected = ["Failed to load resource", "ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING"]
    tab.send("tokens=900 delay=0.02 kept")
    tab.expect(tab.page.locator(".said.live")).to_contain_text(" ".join(["kept"] * 60))
    port = own_server.address.rsplit(":", 1)[1]
    own_server.kill()
    tab.says("The connection is lost; trying again")
    own_server.start("--port", port)
    tab.says("Interrupted")
    assert len(tab.answers[0].split()) >= 10
    tab.page.click(".turn .end button")
    tab.expect(tab.page.locator(".said.live")).to_contain_text("kept kept")
    tab.page.click("#stop")
    tab.says("Stopped")
    tab.expect(tab.page.locator(".turn.assistant .branches")).to_have_text("2 / 2")


def test_a_conversation_has_its_own_settings(tab):
    tab.key("s")
    tab.page.fill("[name=max_new_tokens]", "3")
    tab.page.fill("#system_prompt", "Be brief.")
    tab.page.click("#settings-dialog [value=save]")
    tab.ask("tokens=20 brief")
    assert tab.answers == ["brief brief brief"]
    tab.expect(tab.page.locator(".facts")).to_contain_text("ended at its longest length")
    tab.page.reload()
    tab.ready().says("Answered")
    stored = tab.api(f"/api/conversations/{tab.id}")
    assert stored["system_prompt"] == "Be brief." and stored["settings"]["max_new_tokens"] == 3
    tab.page.click("#open-settings")
    tab.expect(tab.page.locator("[name=max_new_tokens]")).to_have_value("3")


def test_models_are_loaded_and_unloaded(tab):
    tab.page.click("#model")
    row = tab.page.locator("#models li")
    if "in memory" in row.inner_text():
        row.get_by_role("button", name="Unload scripted").click()
    row.get_by_role("button", name="Load scripted", exact=True).click()
    tab.expect(row).to_contain_text("in memory")
    row.get_by_role("button", name="Unload scripted").click()
    tab.expect(row).to_contain_text("on disk")
    tab.page.keyboard.press("Escape")
    tab.ask("tokens=1 again")
    tab.expect(tab.page.locator("#model")).to_have_attribute("data-state", "loaded")


def test_failures_say_why_and_can_be_asked_again(tab):
    tab.send("tokens=3 fail=model after=1 sorry")
    tab.says("No answer")
    tab.expect(tab.page.locator(".turn .end")).to_contain_text("the script says fail=model")
    tab.send("tokens=40 delay=0.02 after=3 fail=crash gone")
    tab.says("Interrupted")
    tab.expect(tab.page.locator(".said").last).to_contain_text("gone")
    tab.ask("tokens=2 works again")
    assert tab.answers[-1] == "works again"


def test_export_and_import_lose_nothing_and_double_nothing(tab, tmp_path):
    tab.attach("Rivers flow downhill.", "Rivers").ask("tokens=2 What flows?")
    tab.page.click("#conversation-menu")
    with tab.page.expect_download() as download:
        tab.page.click("[role=menuitem]:has-text('Export as JSON')")
    download.value.save_as(tmp_path / "out.json")
    file = json.loads((tmp_path / "out.json").read_text())
    assert [message["content"] for message in file["conversations"][0]["messages"]] == [
        "tokens=2 What flows?",
        "Rivers flow",
    ]
    tab.page.click("#conversation-menu")
    with tab.page.expect_download() as download:
        tab.page.click("[role=menuitem]:has-text('Export as Markdown')")
    download.value.save_as(tmp_path / "out.md")
    assert "**You:** tokens=2 What flows?" in (tmp_path / "out.md").read_text()

    tab.visit("/settings/")
    tab.page.set_input_files("#import", tmp_path / "out.json")
    tab.says("Everything was here already; nothing has changed.")
    text = (tmp_path / "out.json").read_text()
    for row in [*file["conversations"], *file["conversations"][0]["messages"]]:
        text = text.replace(row["id"], row["id"][:-4] + "beef")
    (tmp_path / "other.json").write_text(text)
    tab.page.set_input_files("#import", tmp_path / "other.json")
    tab.says("Imported 1 conversation, 2 messages and 0 passages.")


def test_keys_are_listed_and_can_be_turned_off(tab):
    page = tab.page
    tab.key("?")
    tab.expect(page.locator("#keys-dialog")).to_be_visible()
    tab.expect(page.locator("#keys-list")).to_contain_text("New conversation")
    page.uncheck("#keys-on")
    page.keyboard.press("Escape")
    tab.key("?")
    tab.expect(page.locator("#keys-dialog")).to_be_hidden()
    page.click("#keys")
    page.check("#keys-on")
    page.keyboard.press("Escape")
    tab.key("/")
    tab.expect(page.locator("#search")).to_be_focused()
    page.keyboard.type("?")
    tab.expect(page.locator("#search")).to_have_value("?")
    tab.expect(page.locator("#keys-dialog")).to_be_hidden()


def test_colours_follow_the_system_until_chosen(open_tab):
    tab = open_tab(color_scheme="dark")

    def paper():
        return tab.page.evaluate("getComputedStyle(document.body.parentElement).backgroundColor")

    dark = paper()
    tab.page.click("#theme")
    assert tab.page.get_attribute("#theme", "aria-label") == "Colours: light"
    light = paper()
    assert light != dark
    tab.page.reload()
    assert paper() == light
    tab.page.click("#theme")
    assert paper() == dark


def test_a_phone_shows_everything_without_scrolling_sideways(open_tab):
    tab = open_tab()
    page = tab.page
    page.set_viewport_size({"width": 390, "height": 780})
    tab.attach("The quick brown fox jumps. " * 8, "Fox").ask("tokens=2 Who jumps?")
    for path in (None, "/sets/", "/settings/"):
        if path:
            tab.visit(path)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        if path is None:
            page.click("#open-side")
            tab.expect(page.locator("#search")).to_be_focused()
            tab.expect(page.locator("#list a").first).to_be_in_viewport()
            page.keyboard.press("Escape")
            tab.expect(page.locator("#side")).to_be_hidden()
            page.click("[aria-label='Show it in the passage']")
            tab.expect(page.locator("#passage mark").last).to_be_in_viewport()
            page.click("#close-passage")


def test_a_thousand_conversations_and_two_thousand_messages_stay_fast(tab, server):
    me = server.person()
    now, rows = "2026-01-01T00:00:00+00:00", []
    how = {"kind": "chat", "model": "scripted", "status": "done", "tokens": 3}
    for i in range(1000):
        rows.append({"title": f"Conversation {i}", "created": now, "updated": now, "messages": []})
        rows[-1]["id"] = f"00000000-0000-7000-8000-{i:012d}"
    parent = None
    for i in range(2000):
        row = {"id": f"00000000-0000-7001-8000-{i:012d}", "role": ("user", "assistant")[i % 2], "created": now}
        row |= {"content": f"message {i} " + "with some **words** " * 20, "parent": parent}
        rows[0]["messages"].append(row | ({"generation": how} if i % 2 else {}))
        parent = row["id"]
    rows[0]["leaf"] = parent
    file = {"format": "babl-conversations", "version": 1, "passages": [], "conversations": rows}
    me.http.timeout = 300
    me.call("POST", "/api/import", content=json.dumps(file).encode())

    def seconds(act, seen):
        begun = time.monotonic()
        act()
        tab.expect(seen).to_be_visible()
        return time.monotonic() - begun

    page = tab.page
    last = page.locator(f"#m-{parent}")
    assert seconds(lambda: tab.visit(f"/c/{rows[0]['id']}/"), last) < 3
    found = page.locator("#list a", has_text="Conversation 999")
    assert seconds(lambda: page.fill("#search", "Conversation 999"), found) < 2
    hit = page.locator("#list a", has_text="message 1234 with")
    assert seconds(lambda: page.fill("#search", "message 1234 with"), hit.first) < 2
    page.fill("#search", "")
    assert seconds(lambda: page.fill("#content", "tokens=1 fast"), page.locator("#count", has_text="tokens")) < 3
    # Typing: the page draws again within a frame or two, however much is loaded above.
    for _ in range(10):
        page.locator("#earlier").evaluate("button => button.click()")
        page.wait_for_timeout(150)
    drawn = page.evaluate(
        """async () => {
            const begun = performance.now();
            for (let i = 0; i < 10; i++) {
                const field = document.getElementById("content");
                field.value += "x";
                field.dispatchEvent(new Event("input"));
                await new Promise(requestAnimationFrame);
            }
            return (performance.now() - begun) / 10;
        }"""
    )
    assert drawn < 100, f"{drawn:.0f} ms"
