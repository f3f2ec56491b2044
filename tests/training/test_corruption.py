import shutil

import pytest

from babl.errors import UserError
from babl.training.checkpoint import find_fault, newest_whole


@pytest.fixture(scope="module")
def finished(undisturbed_run):
    """The folder of two checkpoints, steps 8 and 12."""
    return undisturbed_run("ddp") / "checkpoints"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, empty, flip, remove])
def test_whatever_happens_to_a_file_it_is_named_and_the_checkpoint_before_is_taken(finished, tmp_path, damage):
    names = sorted(path.name for path in (finished / "step_000012").iterdir())
    assert {"config.json", "trainer.json", "manifest.json", "tokenizer.json", "run.toml"} < {*names}
    assert len([name for name in names if name.endswith(".safetensors")]) == 4  # each rank's model and optimizer
    for name in names:
        folder = tmp_path / name
        shutil.copytree(finished, folder, symlinks=True)
        damage(folder / "step_000012" / name)
        whole, (line,) = newest_whole(folder)
        assert whole == folder / "step_000008"
        assert "step_000012: passed over" in line and name in line


def test_no_flipped_bit_of_the_manifest_is_overlooked(finished, tmp_path):
    folder = tmp_path / "step_000012"
    shutil.copytree(finished / "step_000012", folder)
    content = (folder / "manifest.json").read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (folder / "manifest.json").write_bytes(damaged)
        assert find_fault(folder), bytes(damaged)


def test_a_manifest_of_nothing_vouches_for_nothing(finished, tmp_path):
    folder = tmp_path / "step_000012"
    shutil.copytree(finished / "step_000012", folder)
    (folder / "manifest.json").write_text("{}")
    assert find_fault(folder) == "manifest.json names no file"


def test_where_no_checkpoint_is_whole_nothing_starts_over(finished, tmp_path, runs):
    run = tmp_path / "run"
    shutil.copytree(finished.parent, run, symlinks=True)
    remove(run / "checkpoints" / "step_000012" / "trainer.json")
    flip(run / "checkpoints" / "step_000008" / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"no whole checkpoint is left; remove them to start over: .*trainer.json is"):
        newest_whole(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    code, output, _ = runs.finish(runs.start("run", "run.resume=true", ranks=1))
    assert code == 2
    assert "step_000012: passed over, trainer.json is missing" in output
    assert "step_000008: passed over, model-00001-of-00002.safetensors is not what was written" in output
    assert (run / "metrics.jsonl").read_bytes() == before
