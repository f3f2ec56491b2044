"""What the backends share: rates by group, freezing, what a checkpoint may hold; and locks that are left behind."""

import re
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from babl.distributed import compiler
from babl.distributed.backend import DistributedConfig, make_backend
from babl.distributed.base import group_factors, materialize
from babl.distributed.env import World
from babl.errors import UserError
from babl.training.averaging import averaged_weights, keep_average

ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("rates", "factors"),
    [([1.0], [1.0]), ([0.0, 0.0], [1.0, 1.0]), ([1e-4], [1.0]), ([1.0, 0.1], [1.0, 0.1]), ([10.0, 1.0], [10.0, 1.0])],
)
def test_a_groups_rate_is_a_factor(rates, factors):
    assert group_factors(rates) == factors


def test_rates_without_a_common_scale_are_refused():
    with pytest.raises(UserError, match=r"groups have lr 0\.0002, 0\.002: a group's lr is a factor .* must be 1\.0"):
        group_factors([2e-3, 2e-4])


def ready(optimizer_fn, model=None):
    model = model or nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    backend = make_backend(DistributedConfig("ddp"), ALONE, False)
    backend.setup(model, optimizer_fn)
    return model, backend


def step(model, backend, rate=0.1):
    with backend.microbatch(last=True):
        backend.backward(backend.model(torch.ones(2, 3)).sum())
    return backend.step(rate, 0.0)


def test_the_rate_of_each_group_is_kept_from_step_to_step():
    model, backend = ready(
        lambda m: torch.optim.SGD([{"params": m[0].parameters(), "lr": 0.25}, {"params": m[1].parameters(), "lr": 1.0}])
    )
    for rate in (0.1, 0.3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with backend.microbatch(last=True):
            backend.backward(backend.model(torch.ones(2, 3)).sum())
        gradients = {name: gradient.clone() for name, gradient in backend.gradients()}
        backend.step(rate, 0.0)
        for name, parameter in model.named_parameters():
            expected = before[name] - rate * (0.25 if name.startswith("0") else 1.0) * gradients[name]
            assert torch.allclose(parameter, expected, rtol=1e-6), name


def test_freezing_outlives_getting_memory():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    materialize(model)
    assert not model.weight.is_meta and not model.weight.requires_grad and model.bias.requires_grad


def test_what_no_group_has_is_frozen_and_said(capsys):
    model, backend = ready(lambda m: torch.optim.AdamW(m[1].parameters()))
    before = model[0].weight.detach().clone()
    step(model, backend)
    assert (
        torch.equal(model[0].weight, before) and "no group for 2 parameters, first 0.weight" in capsys.readouterr().err
    )
    assert {key.partition("/")[0] for key in backend.save().optimizer} == {"1.weight", "1.bias"}
    assert backend.save().weights.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize("frozen", [True, False])
def test_freezing_too_late_is_refused(frozen):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[0].requires_grad_(frozen)
    model, backend = ready(lambda m: torch.optim.AdamW(m.parameters()), model)
    model[0].requires_grad_(not frozen)
    with pytest.raises(UserError, match=r"0\.\w+: requires_grad was changed after backend\.setup"):
        step(model, backend)


def test_an_optimizer_that_begins_with_its_state_keeps_none_of_what_is_frozen():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    _, backend = ready(lambda m: torch.optim.Adagrad(m.parameters()), model)
    saved = backend.save()
    assert saved.optimizer.keys() == {f"1.{name}/{key}" for name in ("weight", "bias") for key in ("step", "sum")}


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="nothing is trained"):
        ready(lambda m: torch.optim.AdamW(m.requires_grad_(False).parameters()))


def test_a_checkpoint_that_trained_something_else_is_refused():
    _, backend = ready(lambda m: torch.optim.AdamW(m[1].parameters()))
    with pytest.raises(UserError, match=r"0\.weight was trained when the checkpoint was saved, and is frozen now"):
        backend.load({}, {"0.weight/step": torch.ones(())})
    with pytest.raises(UserError, match=r"aux\.weight is in the checkpoint, but this model has no such parameter"):
        backend.load({"aux.weight": torch.ones(2)}, {})


def test_the_average_is_the_recursion_and_can_be_put_in_and_taken_out():
    model, backend = ready(lambda m: keep_average(torch.optim.AdamW(m.parameters()), 0.75))
    with pytest.raises(UserError, match='the optimizer keeps no "average"'), averaged_weights(backend):
        pass
    mean = None
    for _ in range(3):
        step(model, backend)
        now = model[0].weight.detach().clone()
        mean = now if mean is None else 0.75 * mean + 0.25 * now
    with averaged_weights(backend):
        assert torch.allclose(model[0].weight, mean, rtol=1e-6) and not torch.equal(model[0].weight, now)
    assert torch.equal(model[0].weight, now)


def unused_on_some_steps(world):
    """Weights after steps of which some use only a half of the model."""
    halves = nn.ModuleDict({name: nn.Linear(3, 1) for name in ("one", "two")})
    with torch.no_grad():
        for parameter in halves.parameters():
            parameter.fill_(1.0)

    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.halves = halves

        def forward(self, x, which):
            return sum(self.halves[name](x).sum() for name in which)

    backend = make_backend(DistributedConfig("ddp"), world, False)
    backend.setup(Either(), lambda model: torch.optim.SGD(model.parameters()))
    for which in (["one"], ["one", "two"], ["two"]):
        with backend.microbatch(last=True):
            backend.backward(backend.model(torch.full((1, 3), world.rank + 1.0), which))
        backend.step(0.01, 0.0)
    return backend.module.state_dict()


def test_a_parameter_that_a_step_does_not_use_stays_and_holds_up_nobody(run_distributed):
    for weights in run_distributed(unused_on_some_steps):
        for name, value in weights.items():  # two steps each, of 1 + 2 for a weight, 1 + 1 for a bias
            assert torch.allclose(value, torch.tensor(1.0 - 2 * 0.01 * (3.0 if "weight" in name else 2.0))), name


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def test_a_lock_that_nobody_holds_is_told(lock):
    with pytest.raises(UserError, match=rf"{re.escape(str(lock))} was left by a process .* remove it: rm"):
        compiler.check_locks()


def test_a_lock_that_is_held_is_none_of_ours(lock):
    code = f"import os, sys, time; os.open({str(lock)!r}, os.O_RDONLY); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        compiler.check_locks()
    finally:
        holder.kill()
        holder.wait()


def test_a_lock_on_a_shared_file_system_is_waited_for_while_it_is_young(lock, monkeypatch, capsys):
    monkeypatch.setattr(compiler, "_is_shared", lambda path: True)
    monkeypatch.setattr(time, "sleep", lambda seconds: lock.unlink(missing_ok=True))  # the other machine is done
    compiler.check_locks()
    assert f"waiting for {lock}" in capsys.readouterr().err
