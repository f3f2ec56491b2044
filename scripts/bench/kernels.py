"""What Triton kernels cost and gain: compiled for a GPU that need not be here, or measured on the one that is.

The jobs `kernels` and `compile`.
"""

import importlib.util
import json
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from babl import kernel_choice, ops
from babl.errors import UserError
from babl.rng import threshold

Way = Callable[..., Tensor | tuple[Tensor, ...]]
HEADS = 12  # of T5-base
DROPOUT = 0.1
PLAIN = ("torch", "sdpa, written out")  # what babl.ops computes without a kernel
ROWS = (512, 2048, 8192, 32768)
WIDTHS = (512, 768, 1024, 2048, 4096)
LENGTHS = (128, 256, 384, 512, 1024, 2048)


@dataclass
class Case:
    """One operation at one shape, and the ways to compute it.

    Attributes:
        operation: By the name that `babl.ops` chooses kernels by.
        size: As `babl.ops` measures it: elements, or tokens of a text, or rows of a loss.
        width: Of the last axis, a head, or the vocabulary.
        inputs: All of them learn.
        ways: Name -> function of the inputs; the kernel's is "kernel".
        traffic: Bytes that forward and backward must move, about.
        work: Floating point operations of their products.
    """

    operation: str
    size: int
    width: int
    inputs: Sequence[Tensor]
    ways: dict[str, Way] = field(default_factory=dict)
    traffic: int = 0
    work: int = 0


def add(jobs: Any) -> None:
    """Adds two jobs."""
    job = jobs.add_parser("kernels", help="Triton kernels beside what torch has, on a GPU")
    job.add_argument("--repeats", type=int, default=3, metavar="N")
    job.add_argument("--table", action="store_true", help="write kernels/measured.json, by which kernels are chosen")
    job.add_argument("--operation", action="append", default=[], metavar="NAME", help="one only; may be repeated")
    job.set_defaults(run=lambda a: run(a.repeats, a.table, a.operation))
    job = jobs.add_parser(
        "compile", help="registers and memory of the kernels, compiled for GPUs that need not be here"
    )
    job.add_argument("--sm", type=int, action="append", choices=(80, 90), help="one only; may be repeated")
    job.set_defaults(run=lambda a: [row for sm in a.sm or (80, 90) for row in compile_ahead(sm)])


def run(repeats: int, write_table: bool, operations: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the rows of `measure`; kernels are chosen by them from then on, where asked."""
    kernel_choice.use_kernels("off")  # what is compared with is plain torch
    rows = measure(repeats, operations=operations)
    if write_table:
        (gpu, found), *_ = table(rows, torch.cuda.get_device_name()).items()
        kept = {
            name: of
            for name, of in kernel_choice.MEASURED.get(gpu, {}).items()
            if operations and name not in operations
        }
        measured = kernel_choice.MEASURED | {gpu: kept | found}
        kernel_choice.MEASURED_FILE.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return rows


def measure(repeats: int, cases: Iterable[Case] | None = None, operations: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Returns a row for each case and way: milliseconds of forward and backward, what of the ceiling that is, memory.

    Args:
        repeats: Turns in which each way is timed.
        cases: What is measured; by default, every operation at the shapes of published models.
        operations: Of these only; all where empty.

    Raises:
        UserError: There is no GPU, and no cases are given.
    """
    if cases is None and not torch.cuda.is_available():
        raise UserError("kernels are measured on a GPU, and there is none (`compile` needs none)")
    gpu = torch.cuda.is_available()
    bandwidth, peak = ceilings() if gpu else (0.0, 0.0)
    rows = []
    for case in _all_cases() if cases is None else cases:
        if operations and case.operation not in operations:
            continue
        torch.compiler.reset()  # or, after eight shapes, what is to be compiled no longer is
        times: dict[str, list[float]] = {name: [] for name in case.ways}
        memory = {name: _peak_memory(case, way) for name, way in case.ways.items()}  # and compiles it
        for _ in range(repeats):  # in turn
            for name, way in case.ways.items():
                times[name].append(_milliseconds(partial(_step, case, way)))
        for name, found in times.items():
            ms = statistics.median(found)
            row: dict[str, Any] = {
                "operation": case.operation,
                "dtype": str(case.inputs[0].dtype).removeprefix("torch."),
            }
            row |= {"size": case.size, "width": case.width, "by": name, "ms": ms, "MiB": memory[name] / 2**20}
            row |= {"of copy": case.traffic / (ms * 1e-3) / bandwidth if gpu else 0.0}
            rows.append(row | {"of matmul": case.work / (ms * 1e-3) / peak if gpu else 0.0, "all ms": found})
    return rows


def ceilings() -> tuple[float, float]:
    """Returns what this GPU does at best: bytes a second of a copy, and operations a second of a product in bf16."""
    x = torch.empty(2**28, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    copy = _milliseconds(lambda: y.copy_(x))
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product = _milliseconds(lambda: a @ a)
    return 2 * x.nbytes / (copy * 1e-3), 2 * 8192**3 / (product * 1e-3)


def table(rows: Iterable[dict[str, Any]], gpu: str) -> dict[str, Any]:
    """Returns the dispatch table of this GPU: operation -> dtype -> width -> size from which on the kernel is faster.

    It must be faster than what `babl.ops` computes without it, there and at each larger size measured; a width for
    which that is so nowhere is left out. What torch's compiler, FlexAttention and Liger can do is not asked here, for
    `babl.ops` does not have them.
    """
    fastest: dict[tuple[str, str, int], dict[int, dict[str, float]]] = {}
    for row in rows:
        sizes = fastest.setdefault((row["operation"], row["dtype"], row["width"]), {})
        sizes.setdefault(row["size"], {})[row["by"]] = row["ms"]
    found: dict[str, Any] = {}
    for (operation, dtype, width), sizes in fastest.items():
        first = None
        for size, ways in sorted(sizes.items(), reverse=True):
            if ways["kernel"] >= next(ways[name] for name in PLAIN if name in ways):
                break
            first = size
        if first is not None:
            found.setdefault(operation, {}).setdefault(dtype, {})[str(width)] = first
    return {gpu: found}


def _step(case: Case, way: Way) -> None:
    out = way(*case.inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    torch.autograd.grad(outputs, [*case.inputs], [torch.ones_like(part) for part in outputs], allow_unused=True)


def _milliseconds(run: Callable[[], Any]) -> float:
    """Returns the median time of a run, the GPU's cache emptied before each."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(run, quantiles=(0.5,))
    begun = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begun)


def _peak_memory(case: Case, way: Way) -> int:
    _step(case, way)
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _step(case, way)
    return torch.cuda.max_memory_allocated() - before


def _all_cases() -> Iterator[Case]:
    for rows in ROWS:
        for width in WIDTHS:
            yield from elementwise(rows, width, torch.bfloat16, "cuda")
    for length in LENGTHS:
        for width in (64, 128):
            yield from attention(max(1, 16384 // length), HEADS, length, width, torch.bfloat16, "cuda")
            yield rope(max(1, 16384 // length), 4 * HEADS, length, width, torch.bfloat16, "cuda")
    for vocabulary in (32128, 128256, 250880):
        for rows in (256, 2048, 8192):
            yield loss(rows, 2048, vocabulary, torch.bfloat16, "cuda")


def elementwise(rows: int, width: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yields the norms after a residual add, and the gate, on so many rows."""
    from babl.kernels.glu import swiglu
    from babl.kernels.layer_norm import add_layer_norm
    from babl.kernels.rms_norm import add_rms_norm

    x, update = (_random(rows, width, dtype=dtype, device=device) for _ in range(2))
    w, b = (_random(width, dtype=dtype, device=device) for _ in range(2))
    bytes_each, size = x.element_size() * x.numel(), x.numel()
    liger = _liger()
    norm = _ways(partial(add_rms_norm, eps=1e-6), partial(ops.add_rms_norm, eps=1e-6), liger.get("rms_norm"))
    yield Case("rms_norm", size, width, (x, update, w), norm, traffic=8 * bytes_each)
    norm = _ways(partial(add_layer_norm, eps=1e-5), partial(ops.add_layer_norm, eps=1e-5), liger.get("layer_norm"))
    yield Case("layer_norm", size, width, (x, update, w, b), norm, traffic=8 * bytes_each)
    gate = _ways(swiglu, ops.swiglu, liger.get("glu"))
    yield Case("glu", size, width, (x, update), gate, traffic=8 * bytes_each)


def rope(batch: int, heads: int, length: int, width: int, dtype: torch.dtype, device: str) -> Case:
    """Returns the rotation of queries and keys, four heads of one to one of the other."""
    from babl.kernels.rope import rope as kernel

    q = _random(batch, length, heads, width, dtype=dtype, device=device)
    k = _random(batch, length, heads // 4, width, dtype=dtype, device=device)
    angles = torch.rand(1, 1, length, width // 2, device=device).repeat(1, 1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def over(fn: Way) -> Way:
        return lambda q, k: fn(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    traffic = 4 * q.element_size() * (q.numel() + k.numel())
    liger = _liger().get("rope")
    ways = _ways(over(kernel), over(ops.rope), None if liger is None else over(liger))
    return Case("rope", q.numel(), width, (q, k), ways, traffic)


def attention(
    batch: int, heads: int, length: int, width: int, dtype: torch.dtype, device: str, flex: bool = True
) -> Iterator[Case]:
    """Yields T5's attention with dropout and a table that learns, without dropout, and ALiBi's."""
    from babl.kernels.attention import attention as kernel

    qkv = [_random(batch, heads, length, width, dtype=dtype, device=device) for _ in range(3)]
    distances = _random(heads, 2 * length - 1, dtype=torch.float32, device=device)
    slopes = torch.rand(heads, device=device)
    delta = torch.arange(length, device=device) - torch.arange(length, device=device)[:, None]
    key = torch.arange(batch, device=device)
    future = (delta > 0) * torch.finfo(dtype).min
    work = 7 * 2 * batch * heads * length * length * width  # two products forward, five backward

    def written_out(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = table[:, delta + length - 1][None].to(dtype)
        return F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)

    def dropped(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = table[:, delta + length - 1][None].to(dtype)
        return F.scaled_dot_product_attention(q, k, v, bias, dropout_p=DROPOUT, scale=1.0)

    def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = (slopes[:, None, None] * delta + future)[None].to(dtype)
        return F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)

    ours: Way = lambda q, k, v, table: kernel(q, k, v, table, None, 1.0, False)  # noqa: E731
    ways = {"kernel": ours, "sdpa, written out": written_out}
    linear: dict[str, Way] = {"kernel": lambda q, k, v: kernel(q, k, v, slopes, None, 1.0, True)}
    linear["sdpa, written out"] = alibi
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        fused = torch.compile(flex_attention, dynamic=False)
        causal = create_block_mask(lambda b, h, m, n: m >= n, None, None, length, length, device=device)

        def flexed(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
            return fused(q, k, v, lambda s, b, h, m, n: s + table[h, n - m + length - 1], scale=1.0)

        def flexed_alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return fused(q, k, v, lambda s, b, h, m, n: s + slopes[h] * (n - m), block_mask=causal, scale=1.0)

        ways["flex"], linear["flex"] = flexed, flexed_alibi
    yield Case("attention", length, width, (*qkv, distances), ways, work=work)
    # With dropout torch has one fused way left; its mask is another, of the same share.
    drop: dict[str, Way] = {
        "kernel": lambda q, k, v, table: kernel(q, k, v, table, None, 1.0, False, key, threshold(DROPOUT), 1),
        "sdpa, written out": dropped,
    }
    yield Case("attention, dropout", length, width, (*qkv, distances), drop, work=work)
    yield Case("alibi", length, width, qkv, linear, work=work // 2)


def loss(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: str) -> Case:
    """Returns the cross-entropy of a linear layer, beside all logits at once and beside chunks computed twice."""
    from babl.kernels import linear_cross_entropy as file

    x, w = (_random(n, width, dtype=dtype, device=device) for n in (rows, vocabulary))
    labels = torch.randint(vocabulary, (rows,), device=device)

    def chunked(x: Tensor, w: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        total = x.new_zeros((), dtype=torch.float32)
        for start in range(0, rows, file.CHUNK):
            part, label = x[start : start + file.CHUNK], labels[start : start + file.CHUNK]
            total = total + checkpoint(ops.linear_cross_entropy_sum, part, w, label, use_reentrant=False)
        return total

    liger = _liger().get("linear_cross_entropy")
    ways = _ways(
        lambda x, w: file.linear_cross_entropy(x, w, labels),
        lambda x, w: ops.linear_cross_entropy_sum(x, w, labels),
        None if liger is None else lambda x, w: liger(x, w, labels),
    )
    return Case(
        "linear_cross_entropy", rows, vocabulary, (x, w), ways | {"torch, chunked": chunked},
        work=6 * rows * width * vocabulary,
    )  # fmt: skip


def _ways(kernel: Way, reference: Way, liger: Way | None) -> dict[str, Way]:
    """Returns the kernel, plain torch (for whoever has switched kernels off), compiled where there is a GPU, Liger."""
    ways = {"kernel": kernel, "torch": reference}
    if torch.cuda.is_available():
        ways["torch, compiled"] = torch.compile(reference, dynamic=False)
    return ways if liger is None else ways | {"liger": liger}


def _liger() -> dict[str, Way]:
    """Returns Liger's way of each operation that it has; none where it is not installed.

    Its rotation and gate write over their inputs, which saves it memory here.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel import ops as liger

    def add_rms_norm(x: Tensor, update: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        normed, x = liger.LigerFusedAddRMSNormFunction.apply(x, update, w, 1e-6, 0.0, "llama", False)
        return x, normed

    def add_layer_norm(x: Tensor, update: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        x = x + update
        return x, liger.LigerLayerNormFunction.apply(x, w, b, 1e-5)

    def linear_cross_entropy(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        function = liger.LigerFusedLinearCrossEntropyFunction
        return function.apply(x, w, labels, None, None, -100, 0.0, 0.0, "sum")[0]

    return {
        "rms_norm": add_rms_norm,
        "layer_norm": add_layer_norm,
        "glu": liger.LigerSiLUMulFunction.apply,
        "rope": lambda q, k, cos, sin: liger.LigerRopeFunction.apply(q, k, cos[:, 0], sin[:, 0]),
        "linear_cross_entropy": linear_cross_entropy,
    }


def _random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def compile_ahead(capability: int) -> list[dict[str, Any]]:
    """Returns a row for each kernel, launched as the wrappers launch it, compiled for that GPU by triton and ptxas.

    Args:
        capability: 80 for sm_80, 90 for sm_90.

    Raises:
        UserError: TRITON_INTERPRET is set, so that nothing would be compiled.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Absent:
        """A driver of the GPU that is not here: enough to compile for it."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return capability  # triton keeps what it compiled by this number

        def get_current_stream(self, device: int) -> int:
            return 0

    rows: list[dict[str, Any]] = []
    launched: list[dict[str, Any]] = []
    launch = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        compiled = launch(kernel, *args, grid=grid, warmup=True, **settings)
        name = f"{kernel.fn.__module__.rpartition('.')[-1]}.{kernel.fn.__name__}"
        launched.append({"kernel": name} | _resources(triton, compiled))

    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, and nothing would be compiled; unset it")
    triton.runtime.driver.set_active(Absent())
    JITFunction.run = compile_only
    try:
        for case in _ahead():
            facts = {"sm": capability, "operation": case.operation, "width": case.width}
            facts["dtype"] = str(case.inputs[0].dtype).removeprefix("torch.")
            for by in [name for name in case.ways if name in ("kernel", "liger")]:
                launched.clear()
                _step(case, case.ways[by])
                rows += [facts | {"by": by} | row for row in launched]
    finally:
        JITFunction.run = launch
    return rows


def _ahead() -> Iterator[Case]:
    for dtype, widths in ((torch.bfloat16, (64, 128)), (torch.float32, (64,))):
        for width in (768, 8192):
            yield from elementwise(8, width, dtype, "cpu")
        yield rope(1, 8, 16, 128, dtype, "cpu")
        yield loss(4, 16, 1024, dtype, "cpu")
        for width in widths:
            _, dropped, linear = attention(1, 2, 64, width, dtype, "cpu", flex=False)
            yield from (dropped, linear)  # what has no dropout needs less than what has


def _resources(triton: Any, compiled: Any) -> dict[str, Any]:
    """Returns what ptxas says a compiled kernel needs."""
    ptx = compiled.asm["ptx"]
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    (architecture,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [str(ptxas), "-v", f"--gpu-name={architecture}", "-o", "/dev/null", str(source)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    (registers,), (spilled,) = re.findall(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill stores", said)
    return {
        "registers": int(registers),
        "spilled bytes": int(spilled),
        "shared bytes": compiled.metadata.shared,
        "matrix instructions": len(re.findall(r"^\s*(?:wg)?mma[.\w]*(?:m16n|m64n)", ptx, re.MULTILINE)),
    }
