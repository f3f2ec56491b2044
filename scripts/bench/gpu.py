"""What a training step costs on a GPU: tokens a second, memory, and the share of the GPU's arithmetic that is used.

A step is the loop's own: batches from the collator, bf16 by autocast over fp32
weights, the backend `ddp` on one rank, fused AdamW. Weights are random. Plain torch and the kernels take turns, step by
step.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from babl import kernel_choice
from babl.data.collate import Batch, CausalFeature, Feature, collate, collate_causal
from babl.data.loader import dropout_keys
from babl.distributed.backend import Backend, DistributedConfig, make_backend
from babl.distributed.env import world
from babl.errors import UserError
from babl.models.bloom import BloomConfig
from babl.models.llama import LlamaConfig
from babl.models.t5 import T5Config
from babl.models.weights import blank_model
from babl.training.loss import token_loss
from babl.training.optimizer import OptimConfig, make_optimizer
from babl.training.recompute import Recompute, recompute_blocks

_aten = torch.ops.aten
ATTENTION = (
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_cudnn_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu,
)
SEED = 0
WARM_UP = 3  # steps: the first compile kernels and make the optimizer's state
SQUAD = 384, 16  # tokens of a prompt and of an answer, about SQuAD's longest


class Work(NamedTuple):
    """A published shape, and the micro-batch it is trained on."""

    config: Any
    examples: int
    recompute: Recompute = "none"


def _t5(width: int, feed_forward: int, layers: int, heads: int, dropout: float) -> T5Config:
    return T5Config(
        d_model=width, d_ff=feed_forward, num_layers=layers, num_decoder_layers=layers, num_heads=heads,
        dropout_rate=dropout,
    )  # fmt: skip


def _llama(width: int, feed_forward: int, layers: int, heads: int, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256, hidden_size=width, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, tie_word_embeddings=tied, max_position_embeddings=8192,
    )  # fmt: skip


WORK: dict[str, Callable[[], Work]] = {
    "t5-base": lambda: Work(_t5(768, 3072, 12, 12, 0.1), 64),
    "t5-base, no dropout": lambda: Work(_t5(768, 3072, 12, 12, 0.0), 64),
    "t5-large": lambda: Work(_t5(1024, 4096, 24, 16, 0.1), 32),
    "bloom-560m": lambda: Work(BloomConfig(vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16), 32),
    "llama-3.2-1b": lambda: Work(_llama(2048, 8192, 16, 32, tied=True), 32),
    "llama-3.1-8b": lambda: Work(_llama(4096, 14336, 32, 32, tied=False), 16, "all"),
}


def add(jobs: Any) -> None:
    """Adds the job."""
    job = jobs.add_parser("gpu", help="training steps of published shapes on a GPU, without and with kernels")
    job.add_argument("--model", action="append", choices=WORK, help="one only; may be repeated")
    job.add_argument("--steps", type=int, default=10, metavar="N", help="timed ones of each way (default 10)")
    job.set_defaults(run=lambda a: measure(a.model or list(WORK), a.steps))


def measure(models: list[str], steps: int) -> list[dict[str, Any]]:
    """Returns a row for each model and way, plain torch or kernels: milliseconds a step, tokens a second, memory, MFU.

    FLOPs are those of the products that torch counts in one forward and backward without recomputation, a causal
    attention counted in full; MFU is their rate over that of an 8192 x 8192 x 8192 product in bf16 on this GPU.

    Args:
        models: Of `WORK`.
        steps: Timed ones of each way.

    Raises:
        UserError: There is no GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("a training step is measured on a GPU, and there is none")
    from babl.scripts.bench.kernels import ceilings

    _, peak = ceilings()
    rows = []
    for name in models:
        try:
            rows += [{"model": name} | row | {"peak TFLOP/s": peak / 1e12} for row in _model(WORK[name](), steps, peak)]
        except torch.OutOfMemoryError:
            rows.append(
                {"model": name, "by": "does not fit", "MiB": torch.cuda.get_device_properties(0).total_memory >> 20}
            )
        torch.cuda.empty_cache()
    return rows


def _model(work: Work, steps: int, peak: float) -> list[dict[str, Any]]:
    with world() as me:
        model = blank_model(work.config)
        recompute_blocks(model, work.recompute)
        backend = make_backend(DistributedConfig(), me, bf16=True)
        backend.setup(model.train(), partial(make_optimizer, cfg=OptimConfig()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.02)
        batch = _batch(work, model.is_encoder_decoder).to(me.device)
        kernel_choice.use_kernels("off")
        work_done = _flops(backend, batch)
        ways = {"torch": "off", "kernels": "on"}
        times: dict[str, list[float]] = {way: [] for way in ways}
        memory: dict[str, int] = {}
        for number in range(WARM_UP + steps):
            for way, mode in ways.items():
                kernel_choice.use_kernels(mode)
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
                begun = time.perf_counter()
                _step(backend, batch)
                torch.cuda.synchronize()
                if number >= WARM_UP:
                    times[way].append(time.perf_counter() - begun)
                    memory[way] = torch.cuda.max_memory_allocated()
        rows = []
        for way, seconds in times.items():
            took = statistics.median(seconds)
            row: dict[str, Any] = {"by": way, "examples": work.examples, "ms": 1000 * took}
            row |= {"tokens/s": batch.tokens / took, "MiB": memory[way] / 2**20, "TFLOP": work_done / 1e12}
            rows.append(row | {"MFU": work_done / took / peak, "all seconds": seconds})
        return rows


def _batch(work: Work, encoder_decoder: bool) -> Batch:
    source, target = SQUAD
    generator = torch.Generator().manual_seed(SEED)
    draw = partial(torch.randint, 3, 30_000, generator=generator)
    keys = dropout_keys(SEED, 1, range(work.examples))
    kind = Feature if encoder_decoder else CausalFeature
    rows = [kind(str(i), draw((source,)).tolist(), draw((target,)).tolist()) for i in range(work.examples)]
    return collate(rows, 0, keys) if encoder_decoder else collate_causal(rows, keys)


def _step(backend: Backend, batch: Batch) -> None:
    with backend.microbatch(last=True):
        backend.backward(token_loss(backend.model, batch) / batch.targets)
    backend.step(1e-5, 1.0)


def _flops(backend: Backend, batch: Batch) -> int:
    """Returns the floating-point operations of a forward and, at twice as many, its backward."""
    # By default torch counts attention only where queries and keys have as many heads.
    counting = dict.fromkeys(ATTENTION, _attention_flops)
    with (
        torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping=counting) as counter,
        backend.microbatch(last=True),
    ):
        token_loss(backend.model, batch)
    return 3 * counter.get_total_flops()


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """Returns those of q kᵀ and of the product with v, (B, H, T, D), (B, K, S, D) and (B, K, S, D)."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])
