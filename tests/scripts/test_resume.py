"""A run goes on at another world size, and with another backend, as if nothing had happened."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import T5ForConditionalGeneration

from babl.cli import main as babl
from babl.training.checkpoint import find_fault

ROOT = Path(__file__).parent.parent.parent
TINY = "model.shape={d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1, num_decoder_layers=1, dropout_rate=0.2}"
SMALL = [TINY, "model.tokenizer_size=400", "batch.tokens=1500", "optim.schedule=constant", "train.validate_every=4"]


def run(folder, ranks, steps, *overrides):
    """Trains as far as `steps`, from where the folder's run stands."""
    resume = f"run.resume={str((folder / 'debug_cpu').exists()).lower()}"
    script = [str(ROOT / "scripts/train.py"), str(ROOT / "configs/debug_cpu.toml"), f"run.dir={folder}", *SMALL]
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=29657"] if ranks > 1 else []
    command = [sys.executable, *torchrun, *script, resume, f"train.steps={steps}", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result


def losses(folder):
    lines = map(json.loads, (folder / "debug_cpu" / "metrics.jsonl").read_text().splitlines())
    return [line.get("loss", line.get("validation_loss")) for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder, 1, 12)
    return losses(folder)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Four steps of two ranks."""
    folder = tmp_path_factory.mktemp("begun")
    run(folder, 2, 4, "train.async_save=true")
    return folder


def test_two_ranks_write_one_model_folder(begun, capsys):
    latest = begun / "debug_cpu" / "checkpoints" / "latest"
    parts = sorted(path.name for path in latest.glob("*.safetensors"))
    numbers = ("00001-of-00002", "00002-of-00002")
    assert parts == [f"{what}-{number}.safetensors" for what in ("model", "optimizer") for number in numbers]
    assert find_fault(latest) is None
    _, info = T5ForConditionalGeneration.from_pretrained(latest, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert babl(["info", str(latest), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"] == "yes"


@pytest.mark.parametrize(
    "stages",
    [
        [(1, "ddp"), (2, "ddp")],
        [(2, "zero3"), (2, "fsdp")],
        pytest.param([(2, "fsdp"), (1, "zero1")], marks=pytest.mark.slow),
        pytest.param([(1, "zero3"), (2, "zero2")], marks=pytest.mark.slow),
        pytest.param([(1, "fsdp"), (2, "zero3")], marks=pytest.mark.slow),
    ],
    ids=lambda stages: " ".join(f"{backend}-{ranks}" for ranks, backend in stages),
)
def test_the_loss_goes_on_as_undisturbed(undisturbed, begun, tmp_path, stages):
    shutil.copytree(begun / "debug_cpu", tmp_path / "debug_cpu", symlinks=True)
    for steps, (ranks, backend) in zip((8, 12), stages, strict=True):
        result = run(tmp_path, ranks, steps, f"distributed.backend={backend}")
        assert f"step_{steps - 4:06d}" in result.stderr
    assert losses(tmp_path) == pytest.approx(undisturbed, rel=1e-5)


def test_a_model_folder_is_read_by_every_kind_of_backend(begun, tmp_path):
    """Its weights are the same whoever holds them: so are the losses of the first steps."""
    latest = begun / "debug_cpu" / "checkpoints" / "latest"
    found = []
    for backend in ("ddp", "fsdp", "zero3"):
        folder = tmp_path / backend
        overrides = (f"model.path={latest}", f"distributed.backend={backend}", "train.validate_every=0")
        run(folder, 1, 2, *overrides)
        found.append(losses(folder))
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)
