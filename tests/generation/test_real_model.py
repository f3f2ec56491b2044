"""A real pretrained LLaMA of 135 million parameters with a chat template, beside transformers; and it learns."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.data.metrics.squad_metrics import compute_exact

from babl.cli import main
from babl.data.squad import load_squad
from babl.generation import Engine, GenerationConfig
from babl.text import load_tokenizer
from babl.text.prompts import chat_ids, prompt_ids, qa_prompt

pytestmark = pytest.mark.real
ROOT = Path(__file__).parent.parent.parent
CONFIG = """\
[model]
path = "{model}"
[data]
train = "{data}"
max_source_tokens = 128
stride = 32
[batch]
tokens = 512
[optim]
lr = 5e-5
warmup_steps = 2
[train]
steps = 20
precision = "fp32"
validate_every = 1000
"""
SAID = ("What is the capital of Norway?", "Oslo.", " And of\n\nItaly? ", "Rome, the old town.", "Née 日本 😀 <b>?")


@pytest.fixture(scope="module")
def folder(shared):
    """SmolLM2-135M-Instruct in fp32: what the shared script made in build/ before, or makes there now."""
    folder = ROOT / "build" / "smollm2-135m-instruct"
    if not (folder / "tokenizer.json").is_file():
        script = shared / "checkpoints" / "smollm2" / "get.py"
        done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"SmolLM2 cannot be had: {done.stderr.strip().splitlines()[-1]}")
    return folder


def test_twelve_ragged_questions_are_answered_as_by_transformers(folder, shared):
    examples = load_squad(shared / "data" / "squad" / "dev-v1.1-xquad-en.json")[::100][:12]
    engine = Engine.load(folder, "cpu", "float32")
    texts = [qa_prompt(example.question, example.context, "decoder") for example in examples]
    sources = prompt_ids(texts, engine.tokenizer, "decoder")
    assert len({len(ids) for ids in sources}) > 6
    answers = engine.answer(texts, GenerationConfig(24, prompt_lookup_num_tokens=6))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for text, ids, answer in zip(texts, sources, answers, strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        with torch.inference_mode():
            out = reference.generate(
                torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=2,
                eos_token_id=sorted(engine.tokenizer.stop_ids),
            )  # fmt: skip
        assert list(answer.ids) == out[0, len(ids) :].tolist()


@pytest.mark.parametrize("turns", [1, 3, 5])
@pytest.mark.parametrize("system", ["", "Answer in one word."])
def test_conversations_have_the_ids_that_transformers_gives_them(folder, turns, system):
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant", "user", "assistant", "user")
    messages += [{"role": role, "content": text} for role, text in zip(roles, SAID[:turns], strict=False)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat_ids(messages, load_tokenizer(folder)) == expected


@pytest.fixture
def tune(folder, shared, tmp_path):
    """A function: trains the model on real questions and returns the run's folder."""
    tree = json.loads((shared / "data" / "squad" / "train-v1.1-slice.json").read_text())
    tree["data"] = tree["data"][:3]
    for article in tree["data"]:
        article["paragraphs"] = article["paragraphs"][:12]
    (tmp_path / "train.json").write_text(json.dumps(tree))
    (tmp_path / "config.toml").write_text(CONFIG.format(model=folder, data=tmp_path / "train.json"))

    def tune(name, *options, ranks=1, killed_after=None):
        launch = ["-m", "babl.distributed.launch", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launch, ROOT / "scripts" / "train.py", tmp_path / "config.toml"]
        command += [f"run.dir={tmp_path}", f"run.name={name}", *options]
        with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
            if killed_after:
                while not (tmp_path / name / "checkpoints" / killed_after).is_dir() and run.poll() is None:
                    time.sleep(0.1)
                run.kill()
            said = run.communicate()[0]
        assert run.returncode == (-signal.SIGKILL if killed_after else 0), said[-2000:]
        return tmp_path / name

    return tune


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_twenty_steps_on_real_questions_lower_the_loss(tune):
    found = losses(tune("r"))
    assert len(found) == 20
    assert sum(found[-5:]) < 0.8 * sum(found[:5]), found


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_with_the_same_bytes(tune):
    short = ["train.steps=4", "train.save_every=2", "optim.warmup_steps=1"]
    whole = tune("whole", *short)
    tune("broken", *short, killed_after="step_000002")
    broken = tune("broken", *short, "run.resume=true")
    names = sorted(path.name for path in (whole / "checkpoints" / "step_000004").glob("*.safetensors"))
    assert len(names) >= 2, "weights and optimizer"
    for name in names:
        a, b = (run / "checkpoints" / "step_000004" / name for run in (whole, broken))
        assert a.read_bytes() == b.read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "fsdp"])
def test_two_ranks_train_it_as_one_process_does(tune, backend):
    short = ["train.steps=3", "train.save_every=3", "optim.warmup_steps=1"]
    one, two = tune("one", *short), tune("two", *short, f"distributed.backend={backend}", ranks=2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    a, b = ({}, {})
    for run, weights in ((one, a), (two, b)):
        for path in (run / "checkpoints" / "latest").glob("model*.safetensors"):  # each rank has written a share
            weights |= load_file(path)
    assert a.keys() == b.keys()
    largest = max(value.abs().max() for value in a.values())
    assert max((a[key] - b[key]).abs().max() for key in a) < 1e-4 * largest


def test_four_examples_tell_the_model_what_is_asked(folder, shared, tmp_path):
    """Exact match on 60 questions, as other code than ours counted it: 38.3 with the paragraph, 0.0 without."""
    data = shared / "data" / "squad"
    examples = ["--shots", "4", "--shots-from", str(data / "train-v1.1-slice.json")]
    found = {}
    for arm in ("gold", "none"):
        options = [*examples, "--context", arm, "--limit", "60", "--max-new-tokens", "24", "--out", str(tmp_path / arm)]
        assert main(["evaluate", str(folder), str(data / "dev-v1.1-xquad-en.json"), *options]) == 0
        predictions = json.loads((tmp_path / arm / "predictions.json").read_text())
        golds = {e.id: [a.text for a in e.answers] for e in load_squad(data / "dev-v1.1-xquad-en.json")[:60]}
        found[arm] = sum(max(compute_exact(gold, predictions[qid]) for gold in golds[qid]) for qid in golds)
    assert found == {"gold": 23, "none": 0}
