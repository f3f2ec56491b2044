"""The page before real models: a tiny one made here, and one that tells stories."""

import pytest

pytestmark = pytest.mark.browser
REAL = {"BABL_SCRIPTED": "0"}


def test_two_models_of_ones_own_answer_about_a_passage(open_tab, serving, tmp_path, make_model):
    for name in ("one", "two"):
        make_model("t5", tmp_path / "data" / name, 5)
    with serving(tmp_path / "data", REAL) as server:
        tab = open_tab(of=server)
        page = tab.page
        page.click("#model")
        rows = page.locator("#models li")
        tab.expect(rows).to_have_count(2)
        tab.expect(rows.first).to_contain_text("T5")
        rows.first.get_by_role("button", name="Load one").click()
        tab.expect(rows.first).to_contain_text("in memory")
        page.keyboard.press("Escape")

        page.click("#open-settings")
        page.fill("[name=max_new_tokens]", "8")
        page.click("#settings-dialog [value=save]")
        tab.attach("The fox lives in a den. " * 60, "Fox")
        page.click("#compare")
        page.get_by_role("group", name="Models to compare").get_by_label("two").check()
        page.fill("#content", "Where does the fox live?")
        tab.expect(page.locator("#count")).to_contain_text("windows of")
        tab.expect(page.locator("#count")).to_contain_text("two: ")
        page.press("#content", "Enter")
        columns = page.locator(".columns .turn")
        tab.expect(columns).to_have_count(4)
        tab.says("Answered")
        for i in (0, 2):  # what random weights say is nowhere in it
            tab.expect(columns.nth(i).locator(".verdict.absent")).to_contain_text("Not in the passage · probability")
            tab.expect(columns.nth(i).locator(".facts")).to_contain_text("windows")
        page.click("#model")
        rows.first.get_by_role("button", name="Unload one").click()
        tab.expect(rows.first).to_contain_text("on disk")
        tab.expect(rows.last).to_contain_text("in memory")
        page.goto("about:blank")  # while it is open, the list goes on asking a server that now ends


def test_a_story_is_stopped_and_another_reloaded_in_mid_stream(open_tab, serving, tmp_path, shared):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/stories260K").symlink_to((shared / "checkpoints/stories260K").resolve())
    with serving(tmp_path / "data", REAL) as server:
        tab = open_tab(of=server)
        page = tab.page
        page.click("#open-settings")
        page.fill("[name=max_new_tokens]", "400")
        page.click("#settings-dialog [value=save]")
        page.select_option("#kind", "completion")
        tab.send("Once upon a time, there was a")
        tab.expect(page.locator(".said.live")).to_contain_text(" ")
        page.keyboard.press("Escape")
        tab.says("Stopped")
        kept = tab.answers
        page.reload()
        tab.says("Stopped")
        assert tab.answers == kept and 0 < len(kept[0].split()) < 300

        page.select_option("#kind", "completion")
        tab.send("The little dog wanted to")
        tab.expect(page.locator(".said.live")).to_contain_text(" ")
        page.reload()
        tab.says("Answered")
        stored = tab.api(f"/api/conversations/{tab.id}")["messages"][-1]
        assert stored["status"] == "done" and tab.answers[-1].split() == stored["content"].split()
