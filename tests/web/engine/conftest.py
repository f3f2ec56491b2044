"""Tiny models of every family in folders, a scheduler without a process, and clients of real processes."""

import asyncio
import itertools
import json
import os

import pytest
import torch

from babl.generation import Engine
from babl.models.build import ModelConfig, build_model
from babl.models.weights import save_pretrained
from babl.text import train_tokenizer
from babl.web.engine.client import EngineClient
from babl.web.engine.protocol import ChatRequest, CompletionRequest, Done, Failed, Message, QARequest, Settings

WORDS = "the small fox reads a long book about old rivers and the town where nobody asks who answers what"
SHAPES = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
    "llama": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256,
    },
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 6},
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(family, folder, seed=3):
    """The folder holds a model, sharp enough that no two tokens are equally likely."""
    train_tokenizer([WORDS] * 4, 330, folder)
    model, _ = build_model(ModelConfig(family=family, shape=SHAPES[family], tokenizer=str(folder)), folder, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    save_pretrained(model, folder)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Holds a model of each family, "talks", with a chat template, and two that are unusable."""
    folder = tmp_path_factory.mktemp("models")
    for family in SHAPES:
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
    return {name: Engine.load(folder / name, "cpu") for name in (*SHAPES, "talks")}


numbers = itertools.count()


def chat(model, *contents, context=None, user="", system=None, **settings):
    roles = itertools.cycle(("user", "assistant"))
    messages = [Message(role, content) for role, content in zip(roles, contents, strict=False)]
    messages = ([Message("system", system)] if system else []) + messages
    return ChatRequest(f"r{next(numbers)}", model, messages, Settings(**settings), context, user)


def complete(model, prompt, user="", **settings):
    return CompletionRequest(f"r{next(numbers)}", model, prompt, Settings(**settings), user)


def ask(model, question, context=None, user="", **settings):
    return QARequest(f"r{next(numbers)}", model, question, context, Settings(**settings), user)


async def events_of(client, request):
    return [event async for event in client.submit(request)]


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


def text_of(events):
    """Returns the last event, which is `Done` and whose text is that of the pieces before it."""
    done = events[-1]
    assert isinstance(done, Done), done
    assert "".join(event.text for event in events if type(event).__name__ == "Delta") == done.text
    return done


def failure_of(events):
    assert isinstance(events[-1], Failed), events[-1]
    return events[-1]
