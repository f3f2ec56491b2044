"""Walks through docs/web.md in a real Chromium and takes its pictures: `python scripts/web_pictures.py`.

Needs what `make demo` has trained, a LLaMA that tells stories (`--stories`), Chromium, and playwright (extra `dev`).
The pictures are looked at before they are committed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright

CHROMIUM = "/usr/bin/chromium"
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
GOLD, NONE = "demo/model-gold", "demo/model-none"
A_FEW_WORDS = re.compile(r"(\w+\W+){6}")


@contextmanager
def serving(runs: Path, stories: Path) -> Iterator[str]:
    """Yields the link to a server with these models and nothing stored."""
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "babl.cli", "serve", "--port", "0", "--data", data]
        command += ["--models", str(runs), "--models", str(stories)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        try:
            yield re.search(r"http://\S+", process.stdout.readline())[0]  # type: ignore[index]
        finally:
            process.terminate()
            process.wait()


class Walk:
    """One page, and the folder its pictures go to."""

    def __init__(self, context: BrowserContext, address: str, out: Path):
        self.page, self.address, self.out = context.new_page(), address, out

    def picture(self, name: str, settled: bool = True) -> None:
        """The page as it is now, or once it has settled, is a picture."""
        self.page.mouse.move(640, 5)
        self.page.wait_for_timeout(300 if settled else 0)
        self.page.screenshot(path=self.out / f"web-{name}.png")

    def new(self, model: str) -> None:
        """A new conversation with this model."""
        self.page.goto(self.address)
        expect(self.page.locator("#model-name")).not_to_have_text("engine is starting")
        self.page.click("#model")
        self.page.locator("#models").get_by_role("radio", name=model).check()
        self.page.locator("#models-dialog").get_by_role("button", name="Close").click()

    def attach(self, title: str, text: str) -> None:
        """The next questions are about this passage."""
        self.page.click("#attach")
        self.page.fill("#attach-text", text)
        self.page.fill("#attach-title", title)
        self.page.click("#attach-dialog [value=text]")
        expect(self.page.locator("#attach-dialog")).to_be_hidden()

    def ask(self, question: str) -> None:
        """The question is answered."""
        self.begin(question)
        expect(self.page.locator("#status")).to_have_text("Answered", timeout=60_000)

    def begin(self, question: str) -> None:
        """The question is on its way."""
        self.page.fill("#content", question)
        self.page.press("#content", "Enter")
        expect(self.page.locator("#content")).to_have_value("")


def walk(desk: Walk, towns: list[dict[str, str]], file: Path) -> None:
    """Takes the pictures of questions about towns, of which the second is answered wrong; `file` is a SQuAD file."""
    page = desk.page
    one, other = towns[0], towns[1]
    desk.new(GOLD)
    desk.attach(one["title"], one["context"])
    desk.ask(one["question"])
    desk.picture("question")

    desk.new(GOLD)
    desk.attach(other["title"], other["context"])
    desk.ask(other["question"])
    page.get_by_role("button", name="Wrong").last.click()
    page.fill("#correct-text", other["answer"])
    desk.picture("correct")

    desk.new(GOLD)
    desk.attach(one["title"], one["context"])
    page.click("#compare")
    page.check("#compare-context")
    page.locator("#compare-models").get_by_label(NONE).check()
    page.click("#right")
    page.fill("#gold", one["answer"])
    desk.ask(one["question"])
    page.click("#open-passage")
    desk.picture("compare")

    page.goto(f"{desk.address}/sets/")
    page.set_input_files("#import", file)
    for model in (NONE, GOLD):
        page.get_by_role("combobox", name="Model").select_option(model)
        page.get_by_role("button", name="Run").click()
        done = page.get_by_role("row", name=model).filter(has_text=re.compile(r"(\d+) / \1\b"))
        expect(done).to_have_count(1, timeout=60_000)
    page.get_by_role("button", name="Compare question by question").click()
    desk.picture("sets")


def conversations(desk: Walk) -> None:
    """Takes the pictures of stories: stopped, reloaded, a branch, a search, and what is done with a conversation."""
    page = desk.page
    desk.new("stories260K")
    page.click("#open-settings")
    page.fill("[name=max_new_tokens]", "480")
    page.fill("[name=temperature]", "0.7")
    page.click("#settings-dialog [value=save]")
    page.select_option("#kind", "completion")
    desk.begin("Once upon a time, there was a lighthouse")
    expect(page.locator(".said.live")).to_contain_text(A_FEW_WORDS)
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Stopped")
    desk.picture("stopped")
    page.get_by_role("button", name="Edit and ask as a new branch").first.click()
    page.fill("#content", "Once upon a time, there was a small bear")
    page.press("#content", "Enter")
    expect(page.locator(".said.live")).to_contain_text(A_FEW_WORDS)
    page.reload()
    expect(page.locator(".facts").last).to_contain_text("tokens/s")
    desk.picture("reloaded", settled=False)
    expect(page.locator("#status")).to_have_text("Answered", timeout=60_000)
    page.locator("#scroll").evaluate("frame => (frame.scrollTop = 0)")
    desk.picture("branch")
    page.fill("#search", "lighthouse")
    page.wait_for_timeout(900)
    page.locator("#list a").first.click()
    page.wait_for_timeout(600)
    desk.picture("search")
    page.fill("#search", "")
    page.click("#conversation-menu")
    desk.picture("export")
    with page.expect_download() as download:
        page.get_by_role("menuitem", name=re.compile("JSON")).click()
    page.goto(f"{desk.address}/settings/")
    page.set_input_files("input[type=file]", download.value.path())
    page.wait_for_timeout(900)
    desk.picture("import")
    page.goto(desk.address)
    expect(page.locator("#model-name")).not_to_have_text("engine is starting")
    page.click("#model")
    page.wait_for_timeout(500)
    desk.picture("models")


def main() -> None:
    """Takes all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="what `make demo` has left (default runs)")
    shared = Path(os.environ.get("BABL_SHARED", "../shared"))
    parser.add_argument("--stories", type=Path, default=shared / "checkpoints/stories260K", metavar="MODEL")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    file = args.runs / "demo" / "data" / "dev.json"
    said = json.loads((args.runs / "demo" / "answers-gold" / "predictions.json").read_text(encoding="utf-8"))
    right: list[dict[str, str]] = []  # questions by how the model that reads has answered them
    wrong: list[dict[str, str]] = []
    for article in json.loads(file.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answer = qa["answers"][0]["text"]
                known = {"title": article["title"], "context": paragraph["context"], "answer": answer}
                (right if said[qa["id"]] == answer else wrong).append(known | {"question": qa["question"]})
    towns = [right[0], wrong[0], right[-1]]
    with serving(args.runs, args.stories) as link, sync_playwright() as playwright:
        browser: Browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(viewport=DESK)  # type: ignore[arg-type]
        desk = Walk(context, link.split("/login")[0], args.out)
        desk.page.goto(link)
        walk(desk, towns, file)
        conversations(desk)
        for name, size, colours in (("phone", PHONE, "light"), ("dark", DESK, "dark")):
            small = browser.new_context(viewport=size, color_scheme=colours)  # type: ignore[arg-type]
            small.add_cookies(context.cookies())  # type: ignore[arg-type]
            other = Walk(small, desk.address, args.out)
            other.new(GOLD)
            other.attach(towns[2]["title"], towns[2]["context"])
            other.ask(towns[2]["question"])
            time.sleep(0.5)
            other.picture(name)
        browser.close()


if __name__ == "__main__":
    main()
