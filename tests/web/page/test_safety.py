"""Nothing that somebody writes runs, nothing is fetched from elsewhere, and nobody is left out."""

import pytest

pytestmark = pytest.mark.browser
XSS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<a href='javascript:alert(1)'>go</a>",
    "[go](javascript:alert(1))",
    "[go](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "![picture](https://evil.example/pixel.png)",
    "<img src='https://evil.example/pixel.png'>",
    "<style>@import 'https://evil.example/x.css'</style>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=https://evil.example/'>",
    "<form action=https://evil.example/><button>go</button></form>",
    "<input autofocus onfocus=alert(1)>",
    "<details open ontoggle=alert(1)>",
    "<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "```js\n</code></pre><script>alert(1)</script>\n```",
    "`<img src=x onerror=alert(1)>`",
    "<<script>script>alert(1)<</script>/script>",
    '"><script>alert(1)</script>',
    "'-alert(1)-'",
    "{{constructor.constructor('alert(1)')()}}",
    "</textarea><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "<a href='//evil.example' ping='https://evil.example/ping'>x</a>",
    "\u202e<b onmouseover=alert(1)>x</b>",
]


def test_no_prompt_passage_title_or_output_runs(tab, server):
    me = server.person()
    whole, parent = "\n\n".join(XSS), None
    conversation = me.conversation(title=whole[:200])
    for text in [*XSS, whole]:
        me.conversation(title=text[:200])
        passage = me.call("POST", "/api/passages", json={"text": f"{text} end", "title": text[:200]})["id"]
        more = {"parent": parent, "passage": passage, "golds": [text], "kind": "chat"} if parent else {}
        parent = me.answer(me.ask(conversation, f"tokens={len(text.split())} delay=0 {text}", **more))["id"]
    page = tab.page
    tab.visit(f"/c/{conversation}/")
    tab.expect(page.locator(".turn")).to_have_count(40)
    page.locator("#earlier").evaluate("button => button.click()")
    tab.expect(page.locator(".turn")).to_have_count(2 * len(XSS) + 2)
    page.evaluate("document.querySelectorAll('.turn').forEach(turn => (turn.style.contentVisibility = 'visible'))")
    tab.expect(page.locator("#passage-text")).to_contain_text("<script>alert(1)</script>")
    tab.expect(page.locator("#list")).to_contain_text("<svg/onload=alert(1)>")
    page.fill("#search", "alert")
    tab.expect(page.locator("#list mark").first).to_be_attached()
    inside = "#log :is(script, img, iframe, style, link, form, input, object, embed, math, noscript)"
    links = "#log a[href]:not([href^='http'], [href^='mailto'])"
    assert page.locator(inside).count() == page.locator(links).count() == 0
    context = page.context.browser.new_context(storage_state=page.context.storage_state(), java_script_enabled=False)
    plain = context.new_page()  # what the server renders for those without scripts is as safe
    plain.goto(page.url)
    assert plain.locator("#log .said").count() == 40
    assert plain.locator(inside).count() == plain.locator(links).count() == 0
    context.close()


def test_the_policy_forbids_what_a_hole_would_let_in(tab):
    tab.expected = ["Content Security Policy", "TrustedHTML", "This document requires"]
    ran = tab.page.evaluate(
        """async () => {
            const element = document.createElement("div");
            try { element.innerHTML = "<img src=x onerror='window.ran = true'>"; } catch (error) { return error.name; }
            document.body.append(element);
            await new Promise(resolve => setTimeout(resolve, 200));
            return window.ran ?? false;
        }"""
    )
    assert ran == "TypeError"
    assert tab.page.evaluate("fetch('https://evil.example/').then(() => 'fetched', error => error.name)") == "TypeError"
    tab.strange = [each for each in tab.strange if "request https://evil.example" not in each]


@pytest.fixture(scope="module")
def axe():
    package = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe here")
    return package.Axe()


def faults(axe, page):
    found = axe.run(page).response["violations"]
    return [
        f"{each['impact']} {each['id']}: {node['html'][:120]} {node['failureSummary'][:200]}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_no_serious_fault(open_tab, axe, colours):
    tab = open_tab(color_scheme=colours, bypass_csp=True)  # axe is injected
    page = tab.page
    assert faults(axe, page) == []
    tab.attach("The fox lives in Ruritania. " * 3, "Fox")
    page.click("#compare")
    page.click("#right")
    page.fill("#gold", "The fox")
    tab.ask("tokens=2 Who **lives** there?\n\n| a | b |\n|---|---|\n| 1 | 2 |")
    page.click("[aria-label='Stop comparing']")
    tab.ask("tokens=30 ```py\nimport x\n```\n\n* one\n* two")
    page.locator("[aria-label=Wrong]").last.click()
    page.fill("#content", "what else")
    assert faults(axe, page) == []
    page.click("#correct-cancel")
    if colours == "dark":  # the rest is the same but for its colours
        return
    for button, dialog in [
        ("#model", "models"),
        ("#open-settings", "settings"),
        ("#attach", "attach"),
        ("#keys", "keys"),
    ]:
        page.click(button)
        tab.expect(page.locator(f"#{dialog}-dialog")).to_be_visible()
        assert faults(axe, page) == [], dialog
        page.keyboard.press("Escape")
    page.click("#conversation-menu")
    assert faults(axe, page) == []
    page.keyboard.press("Escape")
    page.click("#close-passage")
    page.set_viewport_size({"width": 390, "height": 780})
    page.click("#open-side")
    assert faults(axe, page) == []
    for path in ("/sets/", "/settings/"):
        tab.visit(path)
        page.wait_for_load_state("networkidle")
        assert faults(axe, page) == [], path


def test_landmarks_and_live_regions_are_those_a_screen_reader_needs(tab):
    page = tab.page
    tab.ask("tokens=3 hello there")
    for role, name in [("navigation", "Conversations"), ("log", "Messages"), ("form", "Your question"), ("search", "")]:
        tab.expect(page.get_by_role(role, name=name)).to_have_count(1)
    tab.expect(page.get_by_role("main")).to_have_count(1)
    assert page.locator("#log").get_attribute("aria-live") == "off"  # or every word would be spoken
    assert page.locator("[role=status][aria-live=polite]").count() == 1
    assert page.evaluate("document.activeElement.id") == "content"
    assert page.locator("a, button, input").first.get_attribute("class") == "skip"
    page.locator(".skip").focus()
    tab.expect(page.locator(".skip")).to_be_in_viewport()
    page.keyboard.press("Enter")
    tab.expect(page.locator("#content")).to_be_focused()


def test_those_without_scripts_can_read(chromium, open_tab):
    tab = open_tab()
    tab.ask("tokens=3 plain words here")
    state = tab.page.context.storage_state()
    context = chromium.new_context(storage_state=state, java_script_enabled=False)
    page = context.new_page()
    page.goto(tab.page.url)
    said = [text.strip() for text in page.locator("#log .said").all_text_contents()]
    assert said == ["tokens=3 plain words here", "plain words here"]
    assert page.locator("#list a").count() > 0
    context.close()
