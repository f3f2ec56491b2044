import errno
import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from babl.distributed.base import Share
from babl.distributed.env import World
from babl.errors import UserError
from babl.models import from_pretrained
from babl.models.t5 import T5, T5Config
from babl.training import checkpoint
from babl.training.checkpoint import Checkpoints, find_fault, newest_whole, read_state

ALONE = World(0, 1, torch.device("cpu"))
SHAPE = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}


def tiny():
    model = T5(T5Config(vocab_size=40, **SHAPE))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def save(checkpoints, step, model=None):
    """The rank's share of a model is every so-manieth parameter."""
    model = model or tiny()
    named, world = list(model.named_parameters()), checkpoints.world
    share = Share({n: p.detach().clone() for n, p in named[world.rank :: world.size]}, {"a/step": torch.tensor(1.0)})
    checkpoints.save(step, share, model.config, {"step": step}, lambda folder: None)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_last_few_stay_and_every_hundredth_for_good(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALONE, keep_last=2, keep_every=100, background=False)
    for step in (50, 100, 150, 200, 250, 300, 350):
        save(checkpoints, step)
    assert names(tmp_path) == ["latest", "step_000100", "step_000200", "step_000300", "step_000350"]
    assert (tmp_path / "latest").resolve().name == "step_000350"


def test_checkpoints_sort_by_number_also_past_a_million(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALONE, keep_last=2, keep_every=0, background=False)
    for step in (9, 999_998, 1_000_000, 12_000_000):
        save(checkpoints, step)
    assert names(tmp_path) == ["latest", "step_1000000", "step_12000000"]
    assert newest_whole(tmp_path)[0] == (tmp_path / "latest").resolve() == tmp_path / "step_12000000"


def test_what_is_not_named_by_a_step_is_neither_counted_nor_deleted(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALONE, keep_last=1, keep_every=3, background=False)
    save(checkpoints, 1)
    mine = ["step_000001_best", "step_", "step_best", "step_1e3", "my_step_000009", "step_٣"]
    for name in mine:
        shutil.copytree(tmp_path / "step_000001", tmp_path / name)
    (tmp_path / "step_000099").write_text("a file")
    save(checkpoints, 2)
    assert names(tmp_path) == sorted(["latest", "step_000002", "step_000099", *mine])
    assert newest_whole(tmp_path) == (tmp_path / "step_000002", [])


def test_one_that_cannot_be_deleted_is_a_warning_and_the_next_save_tries_again(tmp_path, capsys, monkeypatch):
    checkpoints = Checkpoints(tmp_path, ALONE, keep_last=1, keep_every=0, background=False)
    save(checkpoints, 1)
    remove, busy = os.unlink, True

    def unlink(path, **how):  # as NFS keeps what somebody reads
        if busy and str(path).endswith("config.json"):
            raise OSError(errno.EBUSY, "Device or resource busy", path)
        remove(path, **how)

    monkeypatch.setattr(os, "unlink", unlink)
    save(checkpoints, 2)
    warning = f"warning: {tmp_path / 'step_000001'} cannot be deleted (Device or resource busy)"
    assert capsys.readouterr().err.count(warning) == 1
    assert (tmp_path / "latest").resolve() == newest_whole(tmp_path)[0] == tmp_path / "step_000002"
    busy = False
    save(checkpoints, 3)
    assert names(tmp_path) == ["latest", "step_000003"] and not capsys.readouterr().err


def test_in_a_copy_that_followed_links_latest_is_a_folder_and_is_set_aside(tmp_path, capsys):
    save(Checkpoints(tmp_path / "run", ALONE, 2, 0, False), 5)
    subprocess.run(["cp", "-rL", tmp_path / "run", tmp_path / "copy"], check=True)
    copy = tmp_path / "copy"
    assert newest_whole(copy)[0] == copy / "step_000005"
    save(Checkpoints(copy, ALONE, 1, 0, False), 6)
    assert names(copy) == ["latest", "latest_before_step_000006", "step_000006"]
    assert (copy / "latest").is_symlink() and find_fault(copy / "latest_before_step_000006") is None
    assert f"{copy / 'latest'} is a folder: it is called latest_before_step_000006 now" in capsys.readouterr().err


def test_a_copy_of_a_copy_that_followed_links_is_gone_on_from(tmp_path):
    save(Checkpoints(tmp_path / "0", ALONE, 2, 0, False), 5)
    for generation in (1, 2, 3):
        copy = tmp_path / str(generation)
        subprocess.run(["cp", "-rL", tmp_path / str(generation - 1), copy], check=True)
        Checkpoints(copy, ALONE, 2, 0, False).point_to(copy / "step_000005")
        assert (copy / "latest").is_symlink() and (copy / "latest").resolve() == copy / "step_000005"
    aside = "latest_before_step_000005"
    assert names(copy) == ["latest", aside, f"{aside}_", f"{aside}__", "step_000005"]


def test_where_latest_alone_was_copied_it_is_gone_on_from(tmp_path):
    save(Checkpoints(tmp_path / "run", ALONE, 2, 0, False), 5)
    (tmp_path / "copy").mkdir()
    subprocess.run(["cp", "-rL", tmp_path / "run" / "latest", tmp_path / "copy" / "latest"], check=True)
    assert newest_whole(tmp_path / "copy") == (tmp_path / "copy" / "latest", [])


@pytest.mark.parametrize("target", [None, "step_000004", "step_000002"], ids=["absent", "dangling", "another"])
def test_latest_leads_to_what_is_gone_on_from(tmp_path, target):
    checkpoints = Checkpoints(tmp_path, ALONE, 0, 0, False)
    for step in (2, 5):
        save(checkpoints, step)
    (tmp_path / "latest").unlink()
    if target:
        (tmp_path / "latest").symlink_to(target)
    checkpoints.point_to(newest_whole(tmp_path)[0])
    assert (tmp_path / "latest").resolve() == tmp_path / "step_000005"


@pytest.mark.parametrize("key", ["step", "loader", "data"])
def test_a_state_that_lacks_a_key_is_named(tmp_path, key):
    state = {"step": 1, "loader": {}, "data": {}}
    state.pop(key)
    (tmp_path / "trainer.json").write_text(json.dumps(state))
    with pytest.raises(
        UserError, match=rf"trainer\.json has no '{key}'.*begin one of another run\.name .* model\.path"
    ):
        read_state(tmp_path)


def test_a_newer_one_that_was_passed_over_does_not_push_out_the_new_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALONE, keep_last=1, keep_every=0, background=False)
    save(checkpoints, 8)
    (tmp_path / "step_000012").mkdir()
    save(checkpoints, 10)
    assert newest_whole(tmp_path)[0] == tmp_path / "step_000010" == (tmp_path / "latest").resolve()


def test_what_a_crash_left_behind_goes_with_the_next_save(tmp_path):
    (tmp_path / ".step_000001.tmp").mkdir()
    (tmp_path / ".step_000001.tmp" / "model.safetensors").write_text("half")
    save(Checkpoints(tmp_path, ALONE, 2, 0, False), 2)
    assert names(tmp_path) == ["latest", "step_000002"]


def test_what_the_loop_keeps_of_its_own_may_be_folders_and_is_held_to_the_manifest(tmp_path):
    def write(folder):
        (folder / "average" / "fast").mkdir(parents=True)
        save_file({"w": torch.arange(4.0)}, folder / "average" / "fast" / "model.safetensors")
        (folder / "average" / "best.json").write_text("{}")

    model = tiny()
    share = Share({n: p.detach() for n, p in model.named_parameters()}, {"a/step": torch.tensor(1.0)})
    Checkpoints(tmp_path, ALONE, 2, 0, False).save(1, share, model.config, {"step": 1}, write)
    target = tmp_path / "step_000001"
    manifest = json.loads((target / "manifest.json").read_text())
    on_disk = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if path.is_file()}
    on_disk.pop("manifest.json")
    assert manifest.keys() == on_disk.keys() > {"average/fast/model.safetensors", "average/best.json"}
    for name, path in on_disk.items():
        content = path.read_bytes()
        assert manifest[name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert find_fault(target) is None
    on_disk["average/fast/model.safetensors"].write_bytes(b"x")
    assert "average/fast/model.safetensors has 1 bytes" in find_fault(target)


@pytest.fixture
def slow_disk(monkeypatch):
    """Syncing waits until the event is set."""
    event = threading.Event()
    monkeypatch.setattr(checkpoint, "sync", lambda path: event.wait(30))
    return event


def test_in_the_background_what_is_saved_is_how_it_was(tmp_path, slow_disk):
    checkpoints, model = Checkpoints(tmp_path, ALONE, 2, 0, background=True), tiny()
    before = model.shared.weight.detach().clone()
    save(checkpoints, 1, model)
    with torch.no_grad():
        model.shared.weight.zero_()  # training goes on
    assert newest_whole(tmp_path) == (None, [])
    slow_disk.set()
    checkpoints.join()
    assert find_fault(tmp_path / "step_000001") is None
    assert torch.equal(from_pretrained(tmp_path / "latest").shared.weight, before)


def test_in_the_background_one_save_waits_for_the_one_before(tmp_path, slow_disk):
    checkpoints = Checkpoints(tmp_path, ALONE, 2, 0, background=True)
    save(checkpoints, 1)
    threading.Timer(0.3, slow_disk.set).start()
    begun = time.monotonic()
    save(checkpoints, 2)
    assert time.monotonic() - begun > 0.25
    checkpoints.join()
    assert names(tmp_path) == ["latest", "step_000001", "step_000002"]


def test_in_the_background_an_error_comes_with_the_next_save(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path, ALONE, 2, 0, background=True)
    monkeypatch.setattr(checkpoint, "sync", full)
    save(checkpoints, 1)
    with pytest.raises(UserError, match=r"step_000001: cannot be written \(No space left on device\)"):
        save(checkpoints, 2)
    assert names(tmp_path) == []
    checkpoints.join()  # it is said once


def saved_by_two(world, folder, broken_rank, background):
    """What each rank heard of a first save that works, and a second one that fails on one rank."""
    checkpoints = Checkpoints(Path(folder), world, 2, 0, background)
    save(checkpoints, 1)
    checkpoints.join()
    write = checkpoint.save_file

    def full(tensors, path):
        if world.rank == broken_rank:
            raise OSError(28, "No space left on device")
        write(tensors, path)

    checkpoint.save_file = full
    try:
        save(checkpoints, 2)
        checkpoints.join()
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(("broken_rank", "background"), [(0, False), (1, True)])
def test_one_rank_that_cannot_write_stops_all_and_is_named(run_distributed, tmp_path, broken_rank, background):
    heard = run_distributed(saved_by_two, str(tmp_path), broken_rank, background)
    target = tmp_path / "step_000002"
    assert heard == [f"{target}: cannot be written (rank {broken_rank}: No space left on device)"] * 2
    assert names(tmp_path) == ["latest", "step_000001"]
    assert newest_whole(tmp_path) == (tmp_path / "step_000001", [])
    whole = {name: parameter for name, parameter in from_pretrained(tmp_path / "latest").named_parameters()}
    assert all(torch.equal(parameter, whole[name]) for name, parameter in tiny().named_parameters())
    parts = [load_file(path).keys() for path in sorted((tmp_path / "latest").glob("model-*.safetensors"))]
    assert len(parts) == 2 and all(parts) and not parts[0] & parts[1]
