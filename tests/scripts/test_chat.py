"""`babl chat` in a pseudo-terminal."""

import json
import os
import re
import signal
import sys

import pexpect
import pytest
import torch

from babl.models import save_pretrained
from babl.models.build import ModelConfig, build_model
from babl.text import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '[' ~ m['role'] ~ '] ' ~ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained BLOOM that never writes EOS, with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(["who reads the long book in the old town"] * 3, 300, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    bloom, tokenizer = build_model(ModelConfig(family="bloom", shape={"hidden_size": 64, "n_layer": 2}), folder, 0)
    with torch.no_grad():
        bloom.embed.weight[:, 0] = 0
        bloom.embed.weight[tokenizer.eos_id, 0] = -1
        bloom.final_norm.bias[0] = 1000  # so the logit of EOS is -1000
    save_pretrained(bloom, folder)
    return folder


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def chat(home):
    """A function that starts a chat."""
    running = []

    def start(*arguments):
        env = os.environ | {"BABL_HOME": str(home), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
        command = ["-m", "babl.cli", "chat", *map(str, arguments)]
        child = pexpect.spawn(
            sys.executable, command, env=env, encoding="utf-8", timeout=60, dimensions=(40, 200),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
        )  # fmt: skip
        child.setecho(False)
        running.append(child)
        child.expect("Ctrl-D leaves")
        child.expect("> ")
        return child

    yield start
    for child in running:
        child.close(force=True)


def conversation(home):
    (file,) = (home / "conversations").glob("*.json")
    return json.loads(file.read_text())


def test_a_conversation_is_kept_and_goes_on(chat, model, home, tmp_path):
    child = chat(model, "--max-new-tokens", 5, "--temperature", 0)
    child.sendline("who reads")
    child.expect(r"--max-new-tokens 5 reached")
    child.expect("> ")
    child.sendline(f"/save {tmp_path}/talk.md")
    child.expect("written to")
    child.sendeof()
    child.expect(r"--resume (\S+)")
    id = child.match[1]
    child.expect(pexpect.EOF)
    kept = conversation(home)
    assert kept["id"] == id
    assert [m["role"] for m in kept["messages"]] == ["user", "assistant"]
    assert "**user:** who reads" in (tmp_path / "talk.md").read_text()

    child = chat(model, "--resume", id, "--max-new-tokens", 3)
    child.sendline("and then")
    child.expect("reached")
    child.sendline("/exit")
    child.expect(pexpect.EOF)
    assert [m["content"] for m in conversation(home)["messages"]][::2] == ["who reads", "and then"]


def test_an_answer_about_a_passage_is_a_line_and_what_is_shown_is_what_is_kept(chat, home, shared):
    child = chat(shared / "checkpoints" / "stories260K", "--max-new-tokens", 64, "--temperature", 0)
    shown = []
    for line in ("What did Tom see?", "/context Tom saw a big red ball in the park.", "What did Tom see?"):
        child.sendline(line)
        child.expect("> ")
        shown.append(re.sub(r"^\(.*\)$", "", child.before.replace("\r", ""), flags=re.MULTILINE).strip())
    kept = [message["content"].strip() for message in conversation(home)["messages"] if message["role"] == "assistant"]
    assert kept == [shown[0], shown[2]]
    assert "\n" in kept[0] and "\n" not in kept[1]


def test_ctrl_c_stops_the_answer_and_not_the_program(chat, model, home):
    child = chat(model, "--max-new-tokens", 30_000, "--temperature", 1, "--seed", 1)
    child.sendline("write on and on")
    child.expect(r".{200}")
    child.sendintr()
    child.expect(r"\(stopped\)")
    child.expect("> ")
    child.sendintr()  # with nothing to stop
    child.expect("Ctrl-D or /exit leaves")
    child.expect("> ")
    child.sendline("again")
    child.expect(r".{100}")
    child.sendintr()
    child.expect(r"\(stopped\)")
    child.expect("> ")  # before that the line is not yet read key by key, and Ctrl-D would be lost
    child.sendeof()
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0
    messages = conversation(home)["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert all(len(m["content"]) > 20 for m in messages if m["role"] == "assistant"), "what was written is kept"


def test_commands(chat, model, home, tmp_path):
    (tmp_path / "passage.txt").write_text("the old town by the river\n")
    child = chat(model, "--max-new-tokens", 2)
    for command, answer in (
        ("/help", "/context .*/system .*/model .*/save .*/exit"),
        (f"/context @{tmp_path}/passage.txt", r"context of \d+ tokens"),
        ("/system be brief", "system: be brief"),
        ("/model", re.escape(str(model))),
        (f"/model {model}", re.escape(str(model))),
        ("/model nowhere", "nowhere: no such model folder"),
        ("/context @nowhere.txt", "nowhere.txt cannot be read"),
        ("/contxt", "/contxt: no such command; did you mean '/context'"),
    ):
        child.sendline(command)
        child.expect(answer)
        child.expect("> ")
    child.sendline("where")
    child.expect("reached")
    child.sendline("/exit")
    child.expect(pexpect.EOF)
    kept = conversation(home)
    assert (kept["context"], kept["system"]) == ("the old town by the river", "be brief")
    assert len(kept["messages"]) == 2, "commands are not part of what was said"
