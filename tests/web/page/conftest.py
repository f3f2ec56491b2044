"""A real Chromium before a real server; whatever a test does, nothing may leave the server or break on the page."""

import re
import shutil
from urllib.parse import urlsplit

import pytest

CHROMIUM = "/usr/bin/chromium"
WAIT = 30_000  # milliseconds for what should be there, also on a machine that is busy


class Tab:
    """One page of a browser, logged in."""

    def __init__(self, page, server):
        from playwright.sync_api import expect

        self.page, self.server, self.expect = page, server, expect
        self.strange: list[str] = []  # what must not happen
        self.expected: list[str] = []  # parts of console messages that a test provokes
        page.on("dialog", lambda dialog: (self.strange.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("pageerror", lambda error: self.strange.append(f"error {error}"))
        page.on("console", lambda message: message.type == "error" and self.strange.append(f"console {message.text}"))
        page.on("request", self._watch)

    def _watch(self, request):
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != urlsplit(self.server.address).netloc:
            self.strange.append(f"request {request.url}")

    def enter(self):
        link = re.findall(r"http://\S+token=\S+", self.server.log.read_text())[-1]
        self.page.goto(link)
        return self.ready()

    def ready(self):
        """The page's modules have run."""
        self.expect(self.page.locator("#model-name")).not_to_have_text("engine is starting")
        return self

    def visit(self, path="/"):
        self.page.goto(self.server.address + path)
        return self

    def new(self):
        self.visit()
        self.page.evaluate("localStorage.removeItem('babl:draft:1:new')")
        self.visit()
        return self.ready()

    @property
    def id(self):
        """Of the conversation."""
        return re.search(r"/c/([\w-]+)/", self.page.url)[1]

    def send(self, text):
        """The question is sent, and its answer has begun."""
        before = self.page.locator(".turn.user").count()
        self.page.fill("#content", text)
        self.page.press("#content", "Enter")
        self.expect(self.page.locator(".turn.user")).to_have_count(before + 1)
        return self

    def ask(self, text):
        """The question is answered."""
        self.send(text)
        return self.says("Answered")

    def says(self, text):
        self.expect(self.page.locator("#status")).to_have_text(text)
        return self

    def attach(self, text, title=""):
        self.page.click("#attach")
        self.page.fill("#attach-text", text)
        self.page.fill("#attach-title", title)
        self.page.click("#attach-dialog [value=text]")
        self.expect(self.page.locator("#attach-dialog")).to_be_hidden()
        return self

    def key(self, name):
        """A key is pressed outside of every field."""
        self.page.evaluate("document.activeElement.blur()")
        self.page.keyboard.press(name)

    def api(self, path):
        return self.page.evaluate("path => fetch(path).then(response => response.json())", path)

    @property
    def answers(self):
        """Their texts on the page."""
        return [text.strip() for text in self.page.locator(".turn.assistant .said").all_text_contents()]

    def at_ease(self):
        """Nothing strange has happened."""
        assert not [each for each in self.strange if not any(part in each for part in self.expected)]


@pytest.fixture(scope="session")
def server(tmp_path_factory, serving):
    """One on the embedded database: what the page shows does not depend on it."""
    with serving(tmp_path_factory.mktemp("page"), {}) as this:
        yield this


@pytest.fixture
def own_server(tmp_path, serving):
    """A server that a test may end as it likes."""
    with serving(tmp_path / "data", {}) as this:
        yield this


@pytest.fixture(scope="module")  # while it lives, no event loop can run beside it
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here (make .venv/.installed-dev)")
    if not shutil.which(CHROMIUM):
        pytest.skip(f"no {CHROMIUM} here (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        sync_api.expect.set_options(timeout=WAIT)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_tab(chromium, server):
    """A function that opens a page in a browser profile of its own, or in that of another tab."""
    tabs, contexts = [], []

    def open_(beside=None, of=server, **how):
        if beside is None:
            context = chromium.new_context(viewport={"width": 1280, "height": 800}, **how)
            context.set_default_timeout(WAIT)
            contexts.append(context)
        else:
            context = beside.page.context
        tab = Tab(context.new_page(), of)
        tabs.append(tab)
        return tab if beside else tab.enter()

    yield open_
    for context in contexts:
        context.close()
    for tab in tabs:
        tab.at_ease()


@pytest.fixture
def tab(open_tab):
    return open_tab()
