"""What pages show: Markdown as HTML, and places in texts as browsers count them.

No text can stop the server, or make anybody wait for long: a worker process renders, which ends where a text takes
longer than `markdown.CPU_SECONDS`. Such a text is shown as it is.
"""

import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence

LONGEST = 20_000  # characters of a text that is rendered
KEPT = 256  # texts whose HTML is remembered
DEATHS = 3  # of workers, until the other texts of a page are shown as they are

_kept: OrderedDict[str, str | None] = OrderedDict()
_worker: subprocess.Popen[str] | None = None
_lock = threading.Lock()  # held for one text, so that pages take turns


def render(texts: Sequence[str]) -> list[str | None]:
    """Returns the texts of a page, which are Markdown, as HTML that is safe (`markdown.to_html`).

    None is a text that is to be shown as it is: it is too long, or it or others before it took too long.
    """
    found: list[str | None] = []
    deaths = 0
    for text in texts:
        with _lock:
            if text not in _kept and len(text) <= LONGEST and deaths < DEATHS:
                html, alive = _rendered(text)
                deaths += not alive
                _kept[text] = html
                if len(_kept) > KEPT:
                    _kept.popitem(last=False)
            found.append(_kept.get(text))
    return found


def _rendered(text: str) -> tuple[str | None, bool]:
    """Returns the HTML, and whether the worker has lived to tell it; the next text gets a new one otherwise."""
    global _worker
    if _worker is None:
        command = [sys.executable, "-m", "babl.web.chat.markdown"]
        _worker = subprocess.Popen(  # in a session of its own, so that Ctrl-C is not for it
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
    """Returns a place in a text, in code points (Python) and in UTF-16 units (JavaScript)."""
    if start is None or end is None:
        return None
    start16 = len(text[:start].encode("utf-16-le")) // 2
    end16 = start16 + len(text[start:end].encode("utf-16-le")) // 2
    return {"start": start, "end": end, "start16": start16, "end16": end16}
