"""Tiny models of every family in folders, a scheduler without a process, and clients of real processes."""

import asyncio
import itertools
import json
import os

import pytest
import torch

from babl.generation import Engine
from babl.web.engine.client import EngineClient
from babl.web.engine.protocol import ChatRequest, CompletionRequest, Delta, Done, Failed, Message, QARequest, Settings
from babl.web.engine.scheduler import Scheduler

FAMILIES = ("t5", "llama", "bloom")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, make_model):
    """Holds a model of each family, "talks", with a chat template, and two that are unusable."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_model(family, folder / family)
    settings = make_model("llama", folder / "talks", seed=5) / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    for name, config in (("odd", {"model_type": "gpt2"}), ("empty", {"model_type": "t5"})):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def engines(folder):
    """Babl's own engines of the same folders."""
    return {name: Engine.load(folder / name, "cpu") for name in (*FAMILIES, "talks")}


numbers = itertools.count()


@pytest.fixture(scope="session")
def chat():
    def make(model, *contents, context=None, user="", system=None, **settings):
        roles = itertools.cycle(("user", "assistant"))
        messages = [Message(role, content) for role, content in zip(roles, contents, strict=False)]
        messages = ([Message("system", system)] if system else []) + messages
        return ChatRequest(f"r{next(numbers)}", model, messages, Settings(**settings), context, user)

    return make


@pytest.fixture(scope="session")
def complete():
    def make(model, prompt, user="", **settings):
        return CompletionRequest(f"r{next(numbers)}", model, prompt, Settings(**settings), user)

    return make


@pytest.fixture(scope="session")
def ask():
    def make(model, question, context=None, user="", **settings):
        return QARequest(f"r{next(numbers)}", model, question, context, Settings(**settings), user)

    return make


@pytest.fixture(scope="session")
def answer(loop):
    """A function: the events of requests that are sent to a client together, one list for each."""

    async def events(client, request):
        return [event async for event in client.submit(request)]

    async def together(client, requests):
        return await asyncio.gather(*(events(client, request) for request in requests))

    return lambda client, *requests: loop.run(together(client, requests))


@pytest.fixture(scope="session")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def started(loop):
    """A function that starts clients; when the test ends, their processes have ended."""
    clients = []

    def start(*folders, **options):
        client = EngineClient(folders, **{"device": "cpu"} | options)
        clients.append(client)
        loop.run(client.start())
        return client

    yield start
    for client in clients:
        pid = client.pid
        loop.run(client.stop())
        with pytest.raises(ProcessLookupError):
            os.kill(pid or 2**22 + 1, 0)


@pytest.fixture(scope="session")
def client(loop, folder):
    """One real engine process for all tests that leave it as it was."""
    client = EngineClient([folder], device="cpu")
    loop.run(client.start())
    yield client
    loop.run(client.stop())


class Hand:
    """FairQueue a scheduler by hand, and keeps its events."""

    def __init__(self, folder, **options):
        self.events = {}
        self.order = []
        self.scheduler = Scheduler([folder], self._emit, "cpu", **options)

    def _emit(self, event):
        self.order.append(event)
        self.events.setdefault(event.id, []).append(event)

    def submit(self, *requests):
        for request in requests:
            self.scheduler.submit(request)
        return [request.id for request in requests]

    def endless(self, model):
        """The model never writes its end."""
        engine = self.scheduler._workers[model].loaded.engine
        engine.hook = lambda logits: logits.index_fill(-1, torch.tensor([engine.tokenizer.eos_id]), -1e9)

    def step(self, times=1):
        for _ in range(times):
            self.scheduler.step()

    async def finish(self, *ids):
        while not all(isinstance(self.events[id][-1], Done | Failed) for id in ids):
            if not self.scheduler.step():
                await asyncio.sleep(0.002)

    def kinds(self, id):
        return [type(event).__name__ for event in self.events[id]]

    def last(self, id):
        return self.events[id][-1]

    def text(self, id):
        return "".join(event.text for event in self.events[id] if isinstance(event, Delta))


@pytest.fixture
def hand(loop, folder):
    """A function that gives a scheduler with these models in memory."""

    def make(*models, folder=folder, **options):
        made = Hand(folder, **options)
        for model in models:
            loop.run(made.scheduler.load(model))
        return made

    return make
