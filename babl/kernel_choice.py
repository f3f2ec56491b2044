"""Which implementation computes an operation: plain torch, or a kernel where one can and is wanted.

What is left to torch in any case: fp64, and whatever the kernels do not compute.
"""

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from babl import kernels  # type: ignore[attr-defined]  # packaged from the folder beside this one
from babl.errors import UserError, not_installed

MODES = ("auto", "on", "off")
VARIABLE = "BABL_KERNELS"
WIDEST = {"rms_norm": 8192, "layer_norm": 8192, "attention": 128, "alibi": 128, "rope": 256}  # what a program holds
# GPU -> operation -> dtype -> width -> the size from which on the kernel was faster wherever it was measured.
MEASURED_FILE = Path(kernels.__file__).parent / "measured.json"
MEASURED: dict[str, Any] = json.loads(MEASURED_FILE.read_text(encoding="utf-8"))
_mode = "auto"
_devices: tuple[str, ...] = ("cuda",) if importlib.util.find_spec("triton") else ()


def use_kernels(mode: str | None = None) -> None:
    """Sets how kernels are chosen from now on, in this process and in those it starts.

    Args:
        mode: `auto`, on GPUs, dtypes and shapes for which a kernel was measured to be faster; `on`, wherever one can
            compute what is asked; `off`, nowhere. None: as the environment's BABL_KERNELS says, `auto` where it is not
            set.

    Raises:
        UserError: There is no such mode, or kernels are to be on and cannot run here.
    """
    global _mode, _devices
    name, chosen = (VARIABLE, os.environ.get(VARIABLE, "auto")) if mode is None else ("--kernels", mode)
    if chosen not in MODES:
        raise UserError(f"{name} is {chosen!r}, expected one of {', '.join(MODES)}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    installed = importlib.util.find_spec("triton") is not None
    if chosen == "on" and not installed:
        raise UserError(f"{name} is 'on', but {not_installed('triton')}")
    if chosen == "on" and not (interpreted or torch.cuda.is_available()):
        raise UserError(f"{name} is 'on', but there is no GPU (TRITON_INTERPRET=1 runs kernels on a CPU, for tests)")
    _mode = os.environ[VARIABLE] = chosen
    _devices = () if not installed else ("cuda", "cpu") if interpreted else ("cuda",)


def kernel_chosen(operation: str, x: Tensor, size: int, width: int) -> bool:
    """Returns whether a kernel computes the operation on tensors like x, of this size and width."""
    if _mode == "off" or x.device.type not in _devices or x.dtype == torch.float64:
        return False
    if _mode == "on":
        return width <= WIDEST.get(operation.partition(",")[0], width)
    if not MEASURED or not x.is_cuda:
        return False
    faster = MEASURED.get(_gpu(x.device.index), {}).get(operation, {})
    return size >= faster.get(str(product_dtype(x)).removeprefix("torch."), {}).get(str(width), math.inf)


def _gpu(index: int) -> str:
    return torch.cuda.get_device_name(index)


# A GPU's name is a constant to torch.compile. torch.compiler.assume_constant_result sets this attribute and nothing
# else, but imports the compiler for it: two seconds, and in every process.
_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


def product_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype that a product of x is taken in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
