"""Rendering for pages: Markdown as HTML, and spans of texts in the browser's units.

No text can block the server: a worker process renders, and is killed if a text takes longer than
`markdown.CPU_SECONDS`. Such a text is shown as plain text.
"""

import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence

MAX_CHARACTERS = 20_000  # of a text that is rendered
MAX_CACHED = 256  # texts
MAX_DEATHS = 3  # of workers, after which the other texts of a page stay plain

_cache: OrderedDict[str, str | None] = OrderedDict()
_worker: subprocess.Popen[str] | None = None
_lock = threading.Lock()  # held for one text at a time, so that pages take turns


def render(texts: Sequence[str]) -> list[str | None]:
    """Renders the Markdown texts of a page as safe HTML (`markdown.to_html`).

    None stands for a text to be shown as plain text: it is too long, or it or others before it took too long.
    """
    found: list[str | None] = []
    deaths = 0
    for text in texts:
        with _lock:
            if text not in _cache and len(text) <= MAX_CHARACTERS and deaths < MAX_DEATHS:
                html, alive = _render(text)
                deaths += not alive
                _cache[text] = html
                if len(_cache) > MAX_CACHED:
                    _cache.popitem(last=False)
            found.append(_cache.get(text))
    return found


def _render(text: str) -> tuple[str | None, bool]:
    """Returns the HTML, and whether the worker is alive; if not, the next text gets a new one."""
    global _worker
    if _worker is None:
        command = [sys.executable, "-m", "babl.web.chat.markdown"]
        _worker = subprocess.Popen(  # in its own session, so that Ctrl-C does not reach it
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
    assert _worker.stdin and _worker.stdout
    try:
        print(json.dumps(text), file=_worker.stdin, flush=True)
        answer = _worker.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if answer:
        return json.loads(answer), True
    _worker.communicate()
    _worker = None
    return None, False


def span_json(text: str, start: int | None, end: int | None) -> dict[str, int] | None:
    """Returns a span of a text, in code points (Python) and in UTF-16 units (JavaScript)."""
    if start is None or end is None:
        return None
    start16 = len(text[:start].encode("utf-16-le")) // 2
    end16 = start16 + len(text[start:end].encode("utf-16-le")) // 2
    return {"start": start, "end": end, "start16": start16, "end16": end16}
