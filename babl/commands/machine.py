"""The verb on this machine: `doctor`."""

import argparse

from babl import __version__
from babl.commands.options import Verbs, add_verb, print_facts


def add_doctor(verbs: Verbs) -> None:
    """Adds `babl doctor`."""
    sub = add_verb(verbs, "doctor", doctor, "what this machine can run, and what is missing")
    sub.add_argument("--json", action="store_true")


def doctor(args: argparse.Namespace) -> None:
    """Prints versions, processors and what is missing."""
    import importlib.metadata
    import importlib.util
    import os
    import platform

    import torch

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = {
        "babl": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "gpu": cuda,
        "trains": "float32" + (", bfloat16" if cuda != "none" else "; bfloat16 is slow on most CPUs"),
    }
    uses = {
        "deepspeed": "distributed.backend=zero1, zero2, zero3",
        "tensorboard": "train.tensorboard=true",
        "pyarrow": "data files in Parquet",
        "triton": "kernels on a GPU",
    }
    for package, use in uses.items():
        found = importlib.util.find_spec(package) is not None
        facts[package] = importlib.metadata.version(package) if found else f"not installed (for {use})"
    print_facts(facts, args.json)
