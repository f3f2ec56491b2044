"""One rank of `run_distributed`: calls a function of a test file, and leaves what it returns."""

import importlib.util
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from babl.distributed.env import World

file, function, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
if size > 1:
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), rank=rank, world_size=size)
spec = importlib.util.spec_from_file_location("of_the_test", file)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
arguments = torch.load(folder / "arguments.pt", weights_only=False)
result = getattr(module, function)(World(rank, size, torch.device("cpu")), *arguments)
torch.save(result, folder / f"{rank}.pt")
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
os._exit(0)  # all is on disk; a thread of gloo that is still ending can abort an ordinary exit
