"""Runs a script as `python SCRIPT ARGUMENTS` does, and writes down what its dropout and its steps do.

    python watch.py RECORD.npz SCRIPT ARGUMENTS...

What is recorded is the script's own: whatever `babl.ops.dropout` is when the first model is called, the ids that any
embedding reads, and the steps of any torch optimizer. Nothing is judged here; `observed.py` does that.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

PROBED = {"seeds": [0, 1, 2, 3, 4, 5, 6, 2**31, 2**32 - 1], "steps": [1, 2, 3, 4, 5, 6, 7, 8, 1000, 10**8]}
PROBED |= {"examples": [0, 1, 2, 3, 4, 5, 6, 7, 1000, 10**8]}
PROBE_SHAPE, PROBE_RATE = (16, 24), 0.25


class Recorder:
    """Events in order, each a JSON object; those with an array name it."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.hooked = False

    def add(self, kind: str, array: Tensor | None = None, **values: Any) -> None:
        """Writes down one more event."""
        event = {"kind": kind, **values}
        if array is not None:
            event["array"] = f"a{len(self.arrays)}"
            self.arrays[event["array"]] = array.detach().numpy().copy()
        self.events.append(event)

    def before_forward(self, module: nn.Module, args: tuple) -> None:
        """A module is about to be called."""
        if not self.hooked:
            self.hooked = True
            self._hook_dropout()
        if isinstance(module, nn.Embedding) and args and args[0].ndim == 2:
            self.add("ids", args[0])

    def _hook_dropout(self) -> None:
        from babl import ops

        self.dropout = ops.dropout

        def watched(x: Tensor, p: float, key: Tensor, site: int) -> Tensor:
            if torch._C._current_graph_task_id() != -1:
                return self.dropout(x, p, key, site)  # in a backward: a forward made again, to save memory
            with torch.no_grad():
                ones = self.dropout(torch.ones_like(x, dtype=torch.float32), p, key, site)
            out = self.dropout(x, p, key, site)
            applied = bool(torch.equal(out, x * ones))
            self.add("dropout", ones, p=p, key=key.tolist(), site=site, learns=torch.is_grad_enabled(), applied=applied)
            return out

        ops.dropout = watched

    def probe(self) -> None:
        """Draws masks for seeds, steps and examples that a short run does not come to."""
        from babl.rng import dropout_keys

        for seed in PROBED["seeds"]:
            for step in PROBED["steps"]:
                keys = dropout_keys(seed, step, PROBED["examples"])
                ones = torch.ones(len(keys), *PROBE_SHAPE)
                self.add("probe", self.dropout(ones, PROBE_RATE, torch.tensor(keys), 1), seed=seed, step=step, key=keys)


def main() -> int:
    """Runs the script and saves the record; returns the script's exit code."""
    record, script, *arguments = sys.argv[1:]
    recorder = Recorder()
    register_module_forward_pre_hook(recorder.before_forward)
    register_optimizer_step_post_hook(lambda *_: recorder.add("step"))
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    if code == 0 and recorder.hooked:
        recorder.probe()
    events = np.frombuffer(json.dumps(recorder.events).encode(), np.uint8)
    np.savez(record, events=events, **recorder.arrays)  # type: ignore[arg-type]
    return code


if __name__ == "__main__":
    sys.exit(main())
