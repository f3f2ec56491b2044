"""Which optimizers the sharded backends take, and that those step as on one process; freezing and rates by group."""

import pytest
import torch
from torch import nn

from babl.distributed.backend import DistributedConfig, make_backend
from babl.distributed.env import World
from babl.errors import UserError
from babl.training.adafactor import Adafactor

ALONE = World(0, 1, torch.device("cpu"))
RATE = 0.05
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.9),
    "bare sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.3),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters),
    "babl's adafactor": lambda parameters: Adafactor(parameters),
    "muon": lambda parameters: torch.optim.Muon([p for p in parameters if p.ndim == 2]),
}
WHOLE = {"adafactor", "babl's adafactor", "muon"}  # what looks at a matrix as such


class Net(nn.Module):
    """Odd sizes, which no number of ranks divides."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 7), nn.Linear(7, 5), nn.Linear(5, 1)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x):
        return self.three(self.two(self.one(x).tanh()).tanh())


def data(step):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)


def plain(optimizer_fn, steps=3, frozen=()):
    """What torch alone makes of it: weights and optimizer state."""
    model = Net()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    optimizer = optimizer_fn([p for p in model.parameters() if p.requires_grad])
    for group in optimizer.param_groups:
        group["lr"] = RATE
    for step in range(steps):
        x, y = data(step)
        (model(x) - y).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def trained(world, name, optimizer_fn, steps, model=None, load=None):
    """Weights and optimizer state, whole, after steps in which every rank has its part of the examples."""
    model = model or Net()
    backend = make_backend(DistributedConfig(name), world, False)
    backend.setup(model, optimizer_fn)
    if load:
        backend.load(*({key: Whole(tensor) for key, tensor in part.items()} for part in load))
    for step in steps:
        x, y = (part[world.rank :: world.size] for part in data(step))
        with backend.microbatch(last=True):
            backend.backward((backend.model(x) - y).square().sum())
        backend.step(RATE, 0.0)
    shares = world.gather(backend.save())
    return {k: v for s in shares for k, v in s.weights.items()}, {k: v for s in shares for k, v in s.optimizer.items()}


class Whole:
    """A tensor in memory as one on disk."""

    def __init__(self, tensor):
        self.tensor = tensor

    def get_shape(self):
        return list(self.tensor.shape)

    def __getitem__(self, index):
        return self.tensor[index]


def every_optimizer(world, name):
    """By optimizer: the end of three steps, the end of three of which one is after a resume, or the refusal."""
    results = {}
    for kind, make in OPTIMIZERS.items():
        fn = lambda model, make=make: make(list(model.parameters()))  # noqa: E731
        try:
            straight = trained(world, name, fn, range(3))
            half = trained(world, name, fn, range(2))
            results[kind] = straight, trained(world, name, fn, range(2, 3), load=half)
        except UserError as error:
            results[kind] = str(error)
    return results


@pytest.mark.parametrize(
    ("backend", "refused"),
    [("fsdp", {"adafactor", "muon"}), ("zero1", WHOLE), ("zero3", WHOLE)],
)
def test_what_is_taken_steps_as_on_one_process_and_what_is_not_is_named(run_distributed, backend, refused):
    results = run_distributed(every_optimizer, backend)[0]
    for kind, result in results.items():
        if kind in refused:
            assert kind.removeprefix("babl's ") in result.lower() and backend in result and "AdamW, Lion, SGD" in result
            continue
        (weights, _), (resumed, _) = result
        for name, tensor in plain(OPTIMIZERS[kind]).items():
            assert torch.allclose(weights[name], tensor, rtol=1e-4, atol=1e-6), (kind, name)
            assert torch.equal(resumed[name], weights[name]), (kind, name)
    assert refused == {kind for kind, result in results.items() if isinstance(result, str)}


@pytest.mark.parametrize("shape", [(5, 7), (1, 6), (6, 1), (9,), (2, 3, 4)])
def test_adafactor_is_torchs(shape):
    ours, theirs = (nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))) for _ in range(2))
    optimizers = [
        Adafactor([ours], weight_decay=0.1),
        torch.optim.Adafactor([theirs], weight_decay=0.1, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0),
    ]
    for step, rate in enumerate((0.01, 0.02, 0.5, 1.0)):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step + 1)) * 10.0 ** (step - 2)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad, optimizer.param_groups[0]["lr"] = gradient.clone(), rate
            optimizer.step()
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert optimizers[0].state[ours].keys() == optimizers[1].state[theirs].keys()
