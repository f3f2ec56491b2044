"""Puts a load on `babl serve` and tells what became of it: `python scripts/web_load.py --out benchmarks/web-load.json`.

So many users each ask, read the answer as it is streamed, and ask on, twenty times in a conversation. The engine is a
scripted one, or with --model a real model. Every answer is compared with what is stored in the end; meanwhile /healthz
is asked ten times a second. DATABASE_URL chooses another database than SQLite.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from babl.scripts.bench.turns import machine

TURNS = 20  # questions of a conversation
SCRIPT = "tokens=40 delay=0.05 the quick brown fox jumps over the lazy dog"  # two seconds, twenty words each


@dataclass
class Figures:
    """What was seen.

    Attributes:
        errors: Responses and streams that were not as they should be.
        answers: Content of the answers that were streamed, by id.
        first_seconds: From each question to the first text of its answer.
        health_seconds: That /healthz took.
        memory: MiB of the web process, each second.
        threads: Of the web process, each second.
    """

    errors: list[str] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)
    first_seconds: list[float] = field(default_factory=list)
    health_seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)


async def frames(http: httpx.AsyncClient, stream: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Yields the events of a stream."""
    async with http.stream("GET", stream) as response:
        response.raise_for_status()
        event = ""
        async for line in response.aiter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                event = value
            elif name == "data":
                yield event, json.loads(value)


async def user(http: httpx.AsyncClient, model: str, seconds: float, figures: Figures) -> None:
    """Asks and reads until the time is over."""
    turns, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        if turns % TURNS == 0:
            parent, conversation = None, (await http.post("/api/conversations", json={})).json()["id"]
        begun, text, first = time.monotonic(), "", None
        body: dict[str, Any] = {"client_id": str(uuid.uuid4()), "content": SCRIPT, "models": [model], "parent": parent}
        body["settings"] = {"max_new_tokens": 64, "temperature": 0.8, "seed": len(figures.answers)}
        try:
            response = await http.post(f"/api/conversations/{conversation}/messages", json=body)
            if response.status_code == 429:
                await asyncio.sleep(int(response.headers["Retry-After"]))
                continue
            asked = response.raise_for_status().json()
            async for event, data in frames(http, asked["stream"]):
                if event == "delta":
                    first = first or time.monotonic() - begun
                    if data["at"] != len(text):
                        figures.errors.append(f"a delta at {data['at']}, expected at {len(text)}")
                    text += data["text"]
                elif event == "done":
                    answer = data["message"]
        except httpx.HTTPError as error:
            figures.errors.append(repr(error))
            continue
        if answer["status"] != "done" or (model == "scripted" and text != answer["content"]):
            figures.errors.append(f"an answer {answer['status']}: {answer['error_message']}")
        figures.answers[answer["id"]] = answer["content"]
        figures.first_seconds.append(round(first or time.monotonic() - begun, 4))
        parent, turns = answer["id"], turns + 1


async def watch(http: httpx.AsyncClient, web: psutil.Process, figures: Figures) -> None:
    """Asks for the server's health, and looks at its process, until it is cancelled."""
    for i in range(1 << 30):
        begun = time.monotonic()
        if (await http.get("/healthz")).status_code != 200:
            figures.errors.append("/healthz")
        figures.health_seconds.append(round(time.monotonic() - begun, 4))
        if i % 10 == 0:
            figures.memory.append(round(web.memory_info().rss / 2**20, 1))
            figures.threads.append(web.num_threads())
        await asyncio.sleep(0.1)


async def load(link: str, pid: int, users: int, model: str, seconds: float) -> Figures:
    """Returns what was seen."""
    figures = Figures()
    base = link.split("/login")[0]
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=base, timeout=60, limits=limits) as http,
        httpx.AsyncClient(base_url=base) as other,
    ):
        await http.get(link)
        page = await http.get("/")
        http.headers["X-CSRFToken"] = re.findall(r'name="csrf-token" content="(\w+)"', page.text)[0]
        watching = asyncio.create_task(watch(other, psutil.Process(pid), figures))
        await asyncio.gather(*(user(http, model, seconds, figures) for _ in range(users)))
        watching.cancel()
        stored = json.loads((await http.get("/api/export")).content)
        found = {m["id"]: m["content"] for c in stored["conversations"] for m in c["messages"]}
        lost = [id for id, content in figures.answers.items() if found.get(id) != content]
        figures.errors += [f"answer {id} is not stored as it was streamed" for id in lost]
    return figures


def summary(figures: Figures) -> dict[str, Any]:
    """Returns the figures in short."""
    health, first = (1000 * np.array(each) for each in (figures.health_seconds, figures.first_seconds))
    # Caches and connections have been made by then, and no user has left yet.
    early, late = len(figures.memory) // 4, len(figures.memory) * 9 // 10
    return {
        "answers": len(figures.answers),
        "errors": len(figures.errors),
        "healthz p50 ms": round(float(np.percentile(health, 50)), 1),
        "healthz p99 ms": round(float(np.percentile(health, 99)), 1),
        "first text p50 ms": round(float(np.percentile(first, 50)), 1),
        "first text p95 ms": round(float(np.percentile(first, 95)), 1),
        "memory MiB": [round(figures.memory[early], 1), round(figures.memory[late], 1)],
        "threads": [figures.threads[early], figures.threads[late]],
    }


def main(argv: list[str] | None = None) -> int:
    """Returns 0 where nothing went wrong, else 1."""
    parser = argparse.ArgumentParser(description="Puts a load on `babl serve`.")
    parser.add_argument("--users", type=int, default=64, metavar="N")
    parser.add_argument("--seconds", type=float, default=120, metavar="S")
    parser.add_argument("--models", type=Path, metavar="DIR", help="where --model is")
    parser.add_argument("--model", default="scripted", metavar="NAME")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="add every figure to it")
    args = parser.parse_args(argv)
    if args.users < 1 or not args.seconds > 0:
        parser.error(f"--users is {args.users} and --seconds {args.seconds:g}, expected at least 1 and more than 0")
    scripted = args.model == "scripted"
    environment = os.environ | {"BABL_QUESTIONS_PER_MINUTE": "1000000", "BABL_SCRIPTED": str(int(scripted))}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "babl.cli", "serve", "--port", "0", "--data", folder]
        command += [] if args.models is None else ["--models", str(args.models)]
        server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            link = server.stdout.readline().split()[3]
            figures = asyncio.run(load(link, server.pid, args.users, args.model, args.seconds))
        finally:
            server.terminate()
            server.wait()
    database = "PostgreSQL" if os.environ.get("DATABASE_URL") else "SQLite"
    found = {
        "model": args.model,
        "database": database,
        "users": args.users,
        "seconds": args.seconds,
        **summary(figures),
    }
    print(json.dumps(found, indent=1))
    for error in figures.errors[:10]:
        print(error, file=sys.stderr)
    if args.out is not None:
        rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
        kept = {f"all {name}": value for name, value in asdict(figures).items() if name != "answers"}
        args.out.write_text(json.dumps({"machine": machine(), "rows": [*rows, found | kept]}) + "\n")
    return 1 if figures.errors else 0


if __name__ == "__main__":
    sys.exit(main())
