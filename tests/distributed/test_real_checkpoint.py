"""A trained checkpoint on real questions: two ranks of every backend take the steps that one process takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
CONFIG = """\
[model]
path = "{shared}/checkpoints/stories260K"
[data]
train = "{shared}/data/squad/train-v1.1-slice.json"
max_source_tokens = 384
stride = 64
[batch]
tokens = 4096
[optim]
lr = 1e-3
[train]
steps = 6
"""


@pytest.fixture(scope="module")
def tuned(shared, tmp_path_factory):
    """A function that returns the losses and gradient norms of six steps, and the weights they end with."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "config.toml").write_text(CONFIG.format(shared=shared.resolve()))

    def run(backend, ranks):
        name = f"{backend}-{ranks}"
        launch = ["-m", "babl.distributed.launch", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        settings = [f"run.dir={folder}", f"run.name={name}", f"distributed.backend={backend}"]
        command = [sys.executable, *launch, ROOT / "scripts" / "train.py", folder / "config.toml", *settings]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
        steps = [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
        weights = {}
        for path in (folder / name / "checkpoints/latest").glob("model*.safetensors"):  # each rank has written a share
            weights |= load_file(path)
        return torch.tensor(steps, dtype=torch.float64), weights

    return run


@pytest.fixture(scope="module")
def alone(tuned):
    return tuned("ddp", 1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_two_ranks_train_a_real_checkpoint_as_one_process_does(tuned, alone, backend):
    steps, weights = tuned(backend, 2)
    assert steps.shape == (6, 2) and steps.isfinite().all()
    torch.testing.assert_close(steps, alone[0], rtol=1e-4, atol=0)
    assert weights.keys() == alone[1].keys()
    for name, tensor in alone[1].items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-4 * tensor.abs().max().item(), msg=name)
