"""Answers about passages: where they stand, how right they are, and what the user makes of them."""

import json

import pytest

from babl.data.squad import parse_squad

pytestmark = pytest.mark.browser
FOX = "🦊🦊 The fox 👩‍🚀 lives in Ruritania. It sleeps by day, and Ruritania is quiet.\n\nThen it hunts."


def span_on_page(tab):
    """Returns where the mark in the panel begins and ends, in UTF-16 units, and the whole text."""
    return tab.page.evaluate(
        """() => {
            const place = document.getElementById("passage-text"), mark = place.querySelector("mark");
            const before = document.createRange();
            before.setStart(place, 0);
            before.setEndBefore(mark);
            const start = before.toString().length;
            return [start, start + mark.textContent.length, place.textContent];
        }"""
    )


def test_the_answer_is_marked_where_it_stands_and_its_probability_is_told(tab):
    tab.attach("One 🦊 two. " + FOX, "A fox").ask("tokens=5 Which words?")
    assert tab.answers == ["One 🦊 two. 🦊🦊 The"]
    start, end, text = span_on_page(tab)
    units = text.encode("utf-16-le")
    assert units[2 * start : 2 * end].decode("utf-16-le") == "One 🦊 two. 🦊🦊 The"
    assert text == "One 🦊 two. " + FOX
    tab.expect(tab.page.locator("#passage-answer")).to_have_text("Answer of scripted, probability 61 %")
    tab.expect(tab.page.locator(".evidence")).to_contain_text("In the passage · probability 61 %")
    tab.expect(tab.page.locator(".evidence mark")).to_have_text("One 🦊 two. 🦊🦊 The")
    line = tab.page.locator(".evidence mark").evaluate("mark => getComputedStyle(mark).textDecorationLine")
    assert line == "underline"  # and not colour alone
    tab.expect(tab.page.locator(".turn.user .chip")).to_have_text("A fox")


def test_a_passage_comes_from_a_file_and_is_stored_once(tab, tmp_path):
    (tmp_path / "fox.txt").write_text(FOX, encoding="utf-8")
    for _ in range(2):
        tab.page.click("#attach")
        tab.page.set_input_files("#attach-file", tmp_path / "fox.txt")
        tab.expect(tab.page.locator("#chips")).to_contain_text("fox.txt")
        tab.page.click("[aria-label='Ask without the passage']")
        tab.expect(tab.page.locator("#chips")).to_be_empty()
    tab.page.click("#attach")
    tab.page.get_by_role("list", name="Earlier passages").get_by_role("button", name="fox.txt", exact=True).click()
    tab.expect(tab.page.locator("#passage-text")).to_have_text(FOX)
    assert len([each for each in tab.api("/api/passages")["passages"] if each["title"] == "fox.txt"]) == 1
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    tab.expected = ["400"]
    tab.page.click("#attach")
    tab.page.set_input_files("#attach-file", tmp_path / "bad.txt")
    tab.expect(tab.page.locator("#attach-dialog .problem")).to_contain_text("not a text file in UTF-8")


def test_with_and_without_context_side_by_side_with_scores(tab):
    tab.attach("The North wind blew.", "Wind")
    tab.page.click("#compare")
    tab.page.click("#right")
    tab.page.fill("#gold", "North wind\na north wind")
    tab.ask("tokens=3 What blew")
    columns = tab.page.locator(".columns .turn")
    tab.expect(columns).to_have_count(2)
    tab.expect(columns.nth(0)).to_contain_text("with the passage")
    tab.expect(columns.nth(0).locator(".scores")).to_have_text("EM 100 F1 100")
    tab.expect(columns.nth(1)).to_contain_text("without the passage")
    tab.expect(columns.nth(1)).to_contain_text("Answered without a passage")
    tab.expect(columns.nth(1).locator(".scores")).to_have_text("EM 0 F1 0")
    tab.expect(tab.page.locator(".gains")).to_have_text("scripted: with the passage, F1 +100 and EM +100")
    tab.expect(tab.page.locator(".branches")).to_have_count(0)  # the two are one branch
    columns.nth(1).get_by_role("button", name="Continue from this one").click()
    tab.expect(columns.nth(1)).to_contain_text("continues from here")
    tab.page.reload()
    tab.expect(columns.nth(1)).to_contain_text("continues from here")
    tab.expect(tab.page.locator("#content")).to_be_visible()
    tab.page.locator("[aria-label='Edit and ask as a new branch']").click()
    tab.page.check("#gold-none")
    tab.page.press("#content", "Enter")
    tab.expect(tab.page.locator(".golds")).to_have_text("Right: no answer")
    tab.expect(tab.page.locator(".scores").first).to_have_text("EM 0 F1 0")


def test_the_tokens_are_counted_before_and_what_would_be_cut_is_told(tab):
    tab.page.fill("#content", "one two three")
    tab.expect(tab.page.locator("#count")).to_have_text("3 of 4,096 tokens")
    tab.attach("word " * 4100)
    tab.expect(tab.page.locator("#count")).to_have_text("4,096 of 4,096 tokens · 7 tokens would not be read")
    tab.page.press("#content", "Enter")
    tab.expect(tab.page.locator(".facts")).to_contain_text("7 tokens not read")


def select(tab, words, which=0):
    """The words are selected in the passage, as by a mouse."""
    tab.page.evaluate(
        """([words, which]) => {
            const place = document.getElementById("passage-text");
            let at = -1;
            for (let i = 0; i <= which; i++) at = place.textContent.indexOf(words, at + 1);
            const range = document.createRange();
            const walk = document.createTreeWalker(place, NodeFilter.SHOW_TEXT);
            const set = (unit, how) => {
                walk.currentNode = place;
                while (walk.nextNode()) {
                    if (unit <= walk.currentNode.length) return range[how](walk.currentNode, unit);
                    unit -= walk.currentNode.length;
                }
            };
            set(at, "setStart");
            set(at + words.length, "setEnd");
            document.getSelection().removeAllRanges();
            document.getSelection().addRange(range);
        }""",
        [words, which],
    )


def test_a_wrong_answer_is_put_right_by_selecting_or_typing_the_right_one(tab, tmp_path):
    tab.attach(FOX, "Fox").ask("tokens=2 Where does it live?")
    page = tab.page
    page.click("[aria-label=Wrong]")
    tab.expect(page.locator("#correct")).to_be_visible()
    tab.expect(page.locator("#correct-save")).to_be_disabled()
    select(tab, " Ruritania ", which=0)  # "… and Ruritania is": blanks do not count
    tab.expect(page.locator("#correct-text")).to_have_value("Ruritania")
    page.click("#correct-save")
    tab.expect(page.locator(".judged")).to_have_text("Your feedback: wrong; right is Ruritania")
    begin = FOX.index("Ruritania is")
    assert tab.api(f"/api/conversations/{tab.id}")["messages"][1]["feedback"]["span"] == {
        "start": begin,
        "end": begin + 9,
    }

    page.click("[aria-label=Wrong]")
    page.fill("#correct-text", "nowhere at all")
    tab.expect(page.locator("#correct-found")).to_have_text("This is not in the passage.")
    tab.expect(page.locator("#correct-save")).to_be_disabled()
    page.fill("#correct-text", "Ruritania")
    tab.expect(page.locator("#correct-found")).to_contain_text("2 places in the passage")
    page.press("#correct-text", "Enter")
    tab.expect(page.locator("#correct")).to_be_hidden()
    begin = FOX.index("Ruritania.")
    assert tab.api(f"/api/conversations/{tab.id}")["messages"][1]["feedback"]["span"] == {
        "start": begin,
        "end": begin + 9,
    }

    tab.ask("tokens=1 Who rules it?")
    page.locator("[aria-label=Wrong]").last.click()
    page.click("#correct-none")
    tab.expect(page.locator(".judged").last).to_have_text("Your feedback: wrong; the passage has no answer")
    tab.ask("tokens=3 What comes first?")
    page.locator("[aria-label=Right]:not(#right)").last.click()
    tab.expect(page.locator(".judged").last).to_have_text("Your feedback: right")

    tab.visit("/settings/")
    page.fill("[name=test_share]", "0")
    with page.expect_download() as download:
        page.click("button[value=train]")
    download.value.save_as(tmp_path / "feedback.json")
    examples = parse_squad(json.loads((tmp_path / "feedback.json").read_text(encoding="utf-8")), "feedback")
    told = {
        each.question.split(" ", 1)[1]: [answer.text for answer in each.answers]
        for each in examples
        if each.context == FOX
    }
    assert told == {"Where does it live?": ["Ruritania"], "Who rules it?": [], "What comes first?": ["🦊🦊 The fox"]}


def test_a_question_set_is_imported_run_and_compared(tab, tmp_path):
    def qas(answer, *rest):
        return [{"id": answer, "question": "tokens=2 Which?", "answers": [{"text": answer, "answer_start": 0}]}, *rest]

    impossible = {"id": "none", "question": "tokens=1 Why?", "answers": [], "is_impossible": True}
    paragraphs = [
        {"context": "Red wine is old.", "qas": qas("Red wine", impossible)},
        {"context": "Blue sky.", "qas": qas("Blue")},
    ]
    file = {"version": "v2.0", "data": [{"title": "Colours", "paragraphs": paragraphs}]}
    (tmp_path / "colours.json").write_text(json.dumps(file))
    tab.visit("/sets/")
    page = tab.page
    page.set_input_files("#import", tmp_path / "colours.json")
    card = page.get_by_role("region", name="colours.json")
    tab.expect(card).to_contain_text("3 questions")
    card.get_by_label("With the passages").uncheck()
    card.get_by_role("button", name="Run").click()
    tab.expect(card.locator("tbody tr")).to_have_count(1)
    tab.expect(card.locator("tbody tr")).to_contain_text("3 / 3")
    card.get_by_role("button", name="Run").click()
    tab.expect(card.locator("tbody tr")).to_have_count(2)
    tab.expect(card.locator("tbody tr").first).to_contain_text("3 / 3")
    tab.expect(card.locator("tbody tr").first.locator(".number").first).to_have_text("33.3")
    card.get_by_role("button", name="Compare question by question").click()
    difference = card.get_by_role("region", name="Difference")
    tab.expect(difference).to_contain_text("1 fixed, 0 broken")
    tab.expect(difference.locator("tr.fixed")).to_contain_text("Red wine")
    tab.expect(difference.locator("tr.fixed .number")).to_have_text("+100")


def test_a_key_is_shown_once_and_revoked(tab):
    tab.visit("/settings/")
    tab.page.fill("[name=name]", "laptop")
    tab.page.click("text=New key")
    tab.expect(tab.page.locator("#key-text")).to_contain_text("babl-")
    tab.page.click("[aria-label='Revoke laptop']")
    tab.page.click("#confirm [value=yes]")
    tab.expect(tab.page.locator("#keys")).to_be_empty()


def test_an_example_is_there_to_be_tried(tab):
    tab.page.get_by_role("button", name="Try an example").click()
    field = tab.page.get_by_role("textbox", name="Your question")
    tab.expect(field).to_have_value("Who brought electric light to the lighthouse?")
    tab.expect(field).to_be_focused()
    tab.page.get_by_role("button", name="Send").click()
    tab.expect(tab.page.locator(".turn.user .chip")).to_have_text("The lighthouse of Varn")
    tab.expect(tab.page.locator(".evidence")).to_contain_text("In the passage")
