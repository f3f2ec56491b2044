"""Texts made to stop a server: whoever sends them, the others are served."""

import contextlib
import json
import re
import threading
import time
import uuid
from functools import partial

import httpx

BACKSLASHES = "\\" * 40
FENCES = [  # each language that is highlighted, by its names, and some that pygments does not come back from
    "python", "py", "json", "bash", "sh", "javascript", "js", "typescript", "html", "css", "sql", "c", "cpp", "java",
    "rust", "go", "yaml", "toml", "diff", "scala", "terraform", "systemd", "chapel", "rego", "tads3",
]  # fmt: skip
PAYLOADS = [f'```{name}\n"{BACKSLASHES}\n```' for name in FENCES] + [
    f"```tads3\nextern //{BACKSLASHES}\n```",
    "[" * 50_000,
    "[" * 19_999,
    "![" * 9_000,
    "[](" * 6_000,
    "> " * 9_000 + "a",
    "> - " * 4_500 + "a",
    "\n".join("  " * depth + "- a" for depth in range(130)),
    "*a **b " * 2_500,
    "*" * 9_000 + "a" + "*" * 9_000,
    "|" * 6_000 + "\n" + "|-" * 6_000,
    "|a|b|\n|-|-|\n" + "|x|y|\n" * 3_000,
    "&amp;" * 3_900,
    "".join("`" * (length % 190) + "a" for length in range(210)),
    "\n".join(f"[a{i}]: b" for i in range(1_800)),
    "<!-" * 6_500,
    '```python\nf"' + "{" * 10_000 + "\n```",
    '```html\n<a "' + "<" * 15_000 + "\n```",
]
NEXT = "tokens=3 the next question"
DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "n" * 1_000_000
DATES = ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59+14:00", "2026-02-30T00:00:00", "2026-01-01", "soon", 2**70)
FILE = {"format": "babl-conversations", "version": 1, "passages": [], "conversations": []}
PASSAGE = {"id": str(uuid.uuid4()), "title": "t", "text": "a", "created": "2026-01-01T00:00:00Z"}
DOORS = [  # what else can be sent, and must be answered with a refusal or a success
    *[("POST", "/api/conversations", {"settings": {"seed": seed}}) for seed in (2**70, -(2**70), 1e308, "1", DEEP)],
    *[("POST", "/api/conversations", {"title": title}) for title in (HUGE, "\u202e" * 199, "\0", "\u200b" * 150, [])],
    *[("POST", "/api/import", FILE | {"passages": [PASSAGE | {"created": date}]}) for date in DATES],
    ("POST", "/api/import", FILE | {"passages": [PASSAGE | {"text": HUGE + HUGE}]}),
    ("POST", "/api/import", FILE | {"version": 2**70}),
    ("POST", "/api/import", DEEP),
    ("POST", "/api/sets", DEEP),
    ("POST", "/api/sets", {"version": "1.1", "data": [{"title": HUGE, "paragraphs": [{"context": "a", "qas": []}]}]}),
    ("POST", "/api/passages", {"text": HUGE + HUGE}),
    ("POST", "/api/passages", {"text": "<" * 900_000, "title": HUGE}),
    ("POST", "/api/count", {"content": "a " * 49_000, "model": "../../etc/passwd"}),
    ("POST", "/api/models/load", {"model": "../" * 1_000}),
    ("POST", "/api/models/load", {"model": "<img src=x onerror=alert(1)>"}),
    ("POST", "/api/keys", {"name": HUGE}),
    ("GET", "/api/conversations?q=" + "%27" * 2_000, None),
    ("GET", "/api/conversations?q=" + "(" * 6_000, None),
    ("GET", "/api/events?" + "&".join(f"g={uuid.uuid4()}" for _ in range(120)), None),
]


@contextlib.contextmanager
def watched(address):
    """Yields the seconds that each /healthz took meanwhile; 10 where there was none."""
    seconds, over = [], threading.Event()

    def watch():
        with httpx.Client(timeout=10) as http:
            while True:
                begun = time.monotonic()
                with contextlib.suppress(httpx.TimeoutException):
                    assert http.get(f"{address}/healthz").status_code == 200
                seconds.append(time.monotonic() - begun)
                if over.wait(0.02):
                    break

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seconds
    finally:
        over.set()
        thread.join()


def imported(person, answers):
    """Returns conversations that somebody has imported, in each of which a model has written one of these."""
    id = person.conversation()
    person.answer(person.ask(id, "tokens=1 begin"))
    text = person.http.get(f"/api/conversations/{id}/export").text
    ids = []
    for answer in answers:
        copy = text
        for name in set(re.findall(r"[0-9a-f]{8}-[0-9a-f-]{27}", text)):
            copy = copy.replace(name, str(uuid.uuid4()))
        file = json.loads(copy)
        (conversation,) = file["conversations"]
        next(m for m in conversation["messages"] if m["role"] == "assistant")["content"] = answer
        person.call("POST", "/api/import", json=file)
        ids.append(conversation["id"])
    return ids


def slowest(address, act):
    """Returns the seconds of the slowest /healthz while `act` runs and shortly after it."""
    with watched(address) as seconds:
        act()
        time.sleep(0.1)
    return max(seconds)


def test_no_message_stops_the_others(server):
    """`/healthz` takes at most 250 ms beside each; the machine has other work, so a slow one must be slow thrice."""
    me, other = server.person(), server.person()
    answers = imported(me, PAYLOADS)

    def knock(method, path, body):
        content = body if isinstance(body, str) else None if body is None else json.dumps(body)
        assert me.http.request(method, path, content=content).status_code < 500, (method, path, str(body)[:80])

    def open_(id, payload):
        assert me.thread(id)["messages"][-1]["content"] == payload
        assert me.http.get(f"/c/{id}/").status_code == 200

    def ask(payload):
        assert me.ask(me.conversation(), payload)["question"]["content"] == payload

    acts = [partial(knock, *door) for door in DOORS]
    acts += [partial(open_, id, payload) for id, payload in zip(answers, PAYLOADS, strict=True)]
    acts += [partial(ask, payload) for payload in PAYLOADS]
    for _ in range(3):
        acts = [act for act in acts if slowest(server.address, act) > 0.25]
    assert not acts, [str(act.args)[:200] for act in acts]
    assert other.answer(other.ask(other.conversation(), NEXT))["content"].split() == ["the", "next", "question"]
