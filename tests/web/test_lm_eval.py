"""lm-evaluation-harness asks the server what it asks the engine, and hears the same; it is installed beside."""

import json
import os
import subprocess

import pytest

pytestmark = pytest.mark.slow
TASK = """
task: small
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{folder}/questions.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: " "
metric_list:
  - metric: acc
"""
QUESTIONS = [
    ("Once upon a time, there was a little", ["girl named Lily.", "stone of iron.", "train"], 0),
    ("The cat sat on the", ["mat.", "moon, and the stars were green.", "table"], 0),
    ("Tom wanted to play with his", ["ball.", "tax return.", "friend"], 0),
]
ENGINE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from babl.evaluation.lm_eval import EngineLM
from babl.generation import Engine
model, folder = sys.argv[1:]
tasks = TaskManager(include_path=folder)
samples = simple_evaluate(EngineLM(Engine.load(model, "cpu")), tasks=["small"], task_manager=tasks)["samples"]["small"]
print("ENGINE", json.dumps([[answer[0] for answer in sample["filtered_resps"]] for sample in samples]))
"""


def test_a_task_has_the_log_probabilities_that_the_engine_gives(side_python, serving, shared, tmp_path):
    python = side_python("lm-eval-0.4.13", ["lm-eval==0.4.13", "tenacity"])
    rows = [dict(zip(("question", "choices", "answer"), row, strict=True)) for row in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "small.yaml").write_text(TASK.format(folder=tmp_path))
    model = shared / "checkpoints" / "stories260K"
    # The harness looks for data sets on the hub first, but not where it is told to stay off line.
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"}

    def run(*command, **more):
        done = subprocess.run([python, *map(str, command)], env=environment | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    out = run("-c", ENGINE, model, tmp_path)
    ours = json.loads(next(line for line in out.splitlines() if line.startswith("ENGINE")).removeprefix("ENGINE "))
    with serving(tmp_path / "data", {"BABL_SCRIPTED": "0"}, shared / "checkpoints") as server:
        key = server.person().call("POST", "/api/keys", json={"name": "lm-eval"})["key"]
        address = f"{server.address}/v1/completions"
        asked = f"model=stories260K,base_url={address},tokenizer={model},max_retries=1,add_bos_token=True"
        arguments = ["--tasks", "small", "--include_path", tmp_path, "--model_args", asked]
        arguments += ["--batch_size", 4, "--log_samples", "--output_path", tmp_path / "out"]
        run("-m", "lm_eval", "--model", "local-completions", *arguments, OPENAI_API_KEY=key)
    (samples,) = (tmp_path / "out").rglob("samples_small_*.jsonl")
    theirs = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    for answers, expected in zip(theirs, ours, strict=True):
        assert [float(value) for value, _ in answers] == pytest.approx(expected, abs=1e-4)
