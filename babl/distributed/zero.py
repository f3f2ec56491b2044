"""Optimizer state (1), gradients too (2), weights too (3) shared out among the ranks: DeepSpeed's ZeRO stages."""

import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from babl.distributed.base import (
    DistributedConfig,
    OptimizerFn,
    Share,
    Tensors,
    assign_writers,
    check_stored,
    check_trained,
    exchange_state,
    materialize,
    set_learning_rate,
    settle,
    trained_names,
)
from babl.distributed.compiler import check_locks
from babl.distributed.env import World, start_group
from babl.distributed.trial import check_flat
from babl.errors import UserError, not_installed

ELSEWHERE = {"optimizer": "[optim]", "scheduler": "[optim]", "gradient_clipping": "optim.max_grad_norm"}
LAYOUTS = (
    "round_robin_gradients",
    "mics_shard_size",
    "zero_hpz_partition_size",
)  # pieces are not in the order of ranks


class Zero:
    """See `babl.distributed.base.Backend`."""

    def __init__(self, world: World, bf16: bool, cfg: DistributedConfig):
        self.world, self.bf16, self.cfg = world, bf16, cfg
        self.stage = int(cfg.backend.removeprefix("zero"))
        self.whole = self.stage < 3
        self.settings = merge_settings(make_settings(world.size, bf16, cfg), cfg.deepspeed)

    def setup(self, model: nn.Module, optimizer_fn: OptimizerFn) -> None:
        """Makes model and optimizer ready to train.

        Raises:
            UserError: DeepSpeed is absent or refuses a setting, a killed process has left a lock on its kernels, or the
                optimizer does not compute the same on the flat pieces that ZeRO makes of all parameters.
        """
        deepspeed = _deepspeed(self.cfg.backend, self.world.device)
        check_locks()
        start_group(self.world)
        self.owners = assign_writers(model, self.world.size)
        waits = any(parameter.is_meta for parameter in model.parameters())
        materialize(model)
        optimizer = optimizer_fn(model)
        self.factors = settle(model, optimizer, self.world)
        check_flat(optimizer, self.cfg.backend)
        self.trained = trained_names(model)
        # DeepSpeed knows nothing of frozen parameters; each has one rank that keeps it in fp32.
        frozen = [(n, p) for n, p in model.named_parameters() if n not in self.trained]
        self.frozen = {n: p.detach().to("cpu", copy=True) for n, p in frozen if self.owners[n] == self.world.rank}
        # DeepSpeed rounds the model to bf16 and makes its fp32 master weights of that.
        exact = {n: p.detach().clone() for n, p in model.named_parameters()} if self.bf16 and not waits else {}
        try:
            with redirect_stdout(sys.stderr):  # results alone go to stdout
                self.engine, *_ = deepspeed.initialize(
                    model=model, optimizer=optimizer, config=self.settings, dist_init_required=False
                )
        except ValueError as error:  # of its own check of the settings
            if not self.cfg.deepspeed:
                raise
            raise UserError(f"{self.cfg.deepspeed}: DeepSpeed refuses it ({' '.join(str(error).split())})") from error
        self.module, self.model = model, self.engine
        if exact:
            self._set_weights(exact)

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Is entered for each forward and backward; stages 2 and 3 reduce each micro-batch's gradients, 1 their sum."""
        check_trained(self.module, self.trained)
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Adds up gradients; DeepSpeed averages over ranks, and the loss is a share of a sum, hence the factor."""
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yields nothing.

        Raises:
            UserError: Always: DeepSpeed keeps gradients in flat buffers, by no parameter's name.
        """
        raise UserError(
            f"{self.cfg.backend} keeps no gradients by parameter; distributed.backend=ddp has them, fsdp in shards"
        )

    def step(self, learning_rate: float, max_norm: float) -> float:
        """Clips, updates and forgets the gradients; returns their norm before clipping."""
        self.engine.optimizer.clip_grad = max_norm
        set_learning_rate(self.engine.optimizer.param_groups, self.factors, learning_rate)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def exchange(self, key: str) -> None:
        """Swaps the weights with that part of the optimizer's state."""
        exchange_state(self._flat(), self.engine.optimizer.optimizer.state, key)
        self._publish()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields name and whole value of each parameter, in the precision of a forward."""
        for name, parameter in self.module.named_parameters():
            with _gathered(parameter):
                yield name, parameter.detach()

    def save(self) -> Share:
        """Returns this rank's share; tensors are put together one at a time."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link_state()
        share = Share(dict(self.frozen), {})
        for parameters, flat in zip(self._groups(), self._flat(), strict=True):
            state = self.engine.optimizer.optimizer.state[flat]
            for name, parameter in parameters.items():
                mine = self.owners[name] == self.world.rank
                weight = safe_get_full_fp32_param(parameter)  # every rank takes part, for it gives its piece
                if mine:
                    share.weights[name] = weight.to("cpu", copy=True)
                for key, value in state.items():
                    value = torch.as_tensor(value)
                    if value.shape == flat.shape:
                        value = safe_get_full_optimizer_state(parameter, key)
                    if mine:
                        share.optimizer[f"{name}/{key}"] = value.to("cpu", copy=True)
        return share

    def load(self, weights: Tensors, optimizer: Tensors) -> list[str]:
        """Sets weights and optimizer state, with one whole tensor at a time in memory."""
        absent = check_stored(self.module, self.trained, weights, optimizer)
        for parameters, flat in zip(self._groups(), self._flat(), strict=True):
            state = self.engine.optimizer.optimizer.state[flat]
            for key, stored in optimizer.items():
                name, _, part = key.partition("/")
                if name in parameters and not stored.get_shape():
                    state[part] = stored[...].to(flat.device, copy=True)
                elif name in parameters and part not in state:
                    state[part] = torch.zeros_like(flat)
        self._link_state()
        for key, stored in optimizer.items():
            name, _, part = key.partition("/")
            if stored.get_shape():
                self._set(self.module.get_parameter(name), stored[...], part)
        self._set_weights(weights)
        return absent

    def _flat(self) -> list[Tensor]:
        """Returns this rank's pieces of the fp32 weights, which the optimizer steps."""
        zero = self.engine.optimizer
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        return next(getattr(zero, name) for name in names if hasattr(zero, name))  # stage 3; 1 and 2; 1 in bf16

    def _groups(self) -> list[dict[str, Any]]:
        """Returns the parameters, by name, of which each piece of `_flat` has its part."""
        zero = self.engine.optimizer
        groups = next(getattr(zero, n) for n in ("fp16_groups", "bit16_groups", "bf16_groups") if hasattr(zero, n))
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        return [{names[parameter]: parameter for parameter in group} for group in groups]

    def _link_state(self) -> None:
        """Links optimizer state to parameters, those of the second group included.

        DeepSpeed does this when the first group has made its first step, and the second has no state yet.
        """
        if self.stage < 3:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def _set_weights(self, weights: Mapping[str, Any]) -> None:
        for name, stored in weights.items():
            parameter: Any = self.module.get_parameter(name)
            if name in self.trained:
                self._set(parameter, stored[...], None)
                continue
            if name in self.frozen:
                self.frozen[name] = stored[...].to("cpu", torch.float32, copy=True)
            with _gathered(parameter, changed=True):
                parameter.copy_(stored[...])
        self._publish()

    def _publish(self) -> None:
        """Copies what the optimizer steps to what a forward uses."""
        zero = self.engine.optimizer
        if self.stage < 3:
            zero.update_lp_params()
        else:
            zero.checkpoint_event_prologue()
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            zero.checkpoint_event_epilogue()

    def _set(self, parameter: Any, value: Tensor, key: str | None) -> None:
        """Sets this rank's piece of a parameter's fp32 weight or, with a key, of its optimizer state."""
        from deepspeed import utils

        named = () if key is None else (key,)
        if self.stage < 3:
            put = utils.safe_set_full_fp32_param if key is None else utils.safe_set_full_optimizer_state
            put(parameter, value, *named)
            return
        put = utils.safe_set_local_fp32_param if key is None else utils.safe_set_local_optimizer_state
        piece = torch.zeros(parameter.ds_tensor.numel())  # the last one is longer than what is left of the tensor
        found = value.flatten()[self.world.rank * len(piece) :][: len(piece)]
        piece[: len(found)] = found
        put(parameter, piece, *named)


@contextmanager
def _gathered(parameter: Any, changed: bool = False) -> Iterator[None]:
    """Makes the parameter whole on every rank while the context lasts; `changed` spreads rank 0's value."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if changed else None):
        yield


def make_settings(world_size: int, bf16: bool, cfg: DistributedConfig) -> dict[str, Any]:
    """Returns DeepSpeed's settings for this backend.

    The loop counts micro-batches and targets itself, so DeepSpeed is told of one micro-batch of one example.
    """
    zero: dict[str, Any] = {"stage": int(cfg.backend.removeprefix("zero"))}
    if cfg.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if cfg.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW, which the other backends step with
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


def merge_settings(ours: dict[str, Any], file: str) -> dict[str, Any]:
    """Returns our settings together with those of a user's JSON file, where one is named.

    Raises:
        UserError: The file cannot be read, or says something else than the run's configuration.
    """
    if not file:
        return ours
    try:
        theirs = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"distributed.deepspeed: {file}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"distributed.deepspeed: {file}: not readable as JSON ({error})") from None
    if not isinstance(theirs, dict):
        raise UserError(f"distributed.deepspeed: {file}: expected an object, found {type(theirs).__name__}")
    for key, where in ELSEWHERE.items():
        if key in theirs:
            raise UserError(f"{file}: {key} is {json.dumps(theirs[key])}, but {where} of the run decides that")
    zero = theirs.get("zero_optimization")
    for key in LAYOUTS:
        if isinstance(zero, dict) and zero.get(key):
            raise UserError(
                f"{file}: zero_optimization.{key} is {json.dumps(zero[key])}, which lays out the weights in an order "
                "that a checkpoint cannot be read from; remove it"
            )
    return _merged(ours, theirs, file, "")


def _merged(ours: dict[str, Any], theirs: dict[str, Any], file: str, prefix: str) -> dict[str, Any]:
    result = dict(ours)
    for key, value in theirs.items():
        if key not in ours:
            result[key] = value
        elif isinstance(ours[key], dict) and isinstance(value, dict):
            result[key] = _merged(ours[key], value, file, f"{prefix}{key}.")
        elif ours[key] != value:
            raise UserError(
                f"{file}: {prefix}{key} is {json.dumps(value)}, but the run's configuration makes it "
                f"{json.dumps(ours[key])}"
            )
    return result


def _deepspeed(backend: str, device: torch.device) -> Any:
    os.environ.setdefault("LOCAL_RANK", "0")  # which it asks for even where torchrun started nothing
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with redirect_stdout(sys.stderr):  # its log goes where stdout is now
            import deepspeed
    except ImportError:
        raise UserError(f'distributed.backend is "{backend}", but {not_installed("deepspeed")}') from None
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)  # in its own calls
    return deepspeed
