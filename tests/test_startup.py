"""What a verb imports before it works: Python itself tells, by -X importtime."""

import json
import subprocess
import sys

import pytest
import torch

from babl import kernel_choice
from babl.models import save_pretrained
from babl.models.build import ModelConfig, build_model
from babl.text import train_tokenizer

COMPILER = {"torch._dynamo", "torch._inductor", "sympy", "triton", "torch.distributed.tensor"}
STATISTICS = {"scipy.stats", "scipy.sparse", "sklearn", "pandas", "matplotlib"}
OTHERS = {"deepspeed", "django", "transformers", "huggingface_hub", "httpx"}
SHAPE = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two questions, predictions of them, and an untrained model."""
    folder = tmp_path_factory.mktemp("startup")
    context, qas = "Ada Born built the mill of Ilm in 1840.", []
    for qid, text in (("a", "Ada Born"), ("b", "1840")):
        answer = {"text": text, "answer_start": context.index(text)}
        qas.append({"id": qid, "question": f"{qid}?", "answers": [answer]})
    tree = {"version": "1.1", "data": [{"title": "Ilm", "paragraphs": [{"context": context, "qas": qas}]}]}
    (folder / "data.json").write_text(json.dumps(tree))
    (folder / "predictions.json").write_text(json.dumps({"a": "Ada Born", "b": "1841"}))
    train_tokenizer(["question: who context: somebody did it"], 300, folder / "model")
    save_pretrained(build_model(ModelConfig(shape=SHAPE), folder / "model", 0)[0], folder / "model")
    return folder


@pytest.mark.parametrize(
    "arguments, unneeded",
    [
        (["--help"], {"torch", "numpy", "tokenizers"} | STATISTICS | OTHERS),
        (["score", "data.json", "predictions.json"], {"torch"} | STATISTICS | OTHERS),
        (["compare", "data.json", "predictions.json", "predictions.json"], {"torch", "sklearn", "matplotlib"} | OTHERS),
        (["overlap", "data.json", "data.json"], {"torch", "matplotlib"} | OTHERS),
        (["models", "--models", "."], COMPILER | STATISTICS | OTHERS),
        (["info", "model"], COMPILER | STATISTICS | OTHERS),
        (["query", "model", "who?", "--context", "Ada Born."], COMPILER | STATISTICS | OTHERS),
        (["generate", "model", "who", "--max-new-tokens", "2"], COMPILER | STATISTICS | OTHERS),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_a_verb_imports_nothing_heavy_that_it_does_not_need(folder, arguments, unneeded):
    program = "import sys; from babl.cli import main; sys.exit(main())"
    command = [sys.executable, "-X", "importtime", "-c", program, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "babl.cli" in imported
    assert not imported & unneeded


def test_a_gpus_name_is_marked_for_the_compiler_as_its_own_decorator_marks_it():
    def name():
        return "a GPU"

    before = set(vars(name))
    marked = torch.compiler.assume_constant_result(name)
    assert marked is name
    added = {key: value for key, value in vars(name).items() if key not in before}
    assert added and added.items() <= vars(kernel_choice._gpu).items()
