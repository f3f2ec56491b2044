import pytest
import torch

from babl.errors import UserError
from babl.training.memory import memory_advice


@pytest.mark.parametrize(
    "fail",
    [
        lambda: torch.empty(2**60),  # DefaultCPUAllocator: not enough memory
        lambda: bytearray(2**62),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")),
    ],
)
def test_running_out_of_memory_is_one_line_with_advice(fail):
    with pytest.raises(UserError) as told, memory_advice("the longest micro-batch (8 x 512 tokens)"):
        next(fail())
    line = str(told.value)
    assert line.startswith("out of memory in the longest micro-batch (8 x 512 tokens) (") and "\n" not in line
    for key in ("batch.tokens", "batch.accumulation", "train.activation_checkpointing", "distributed.backend"):
        assert key in line


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shapes"), memory_advice("training"):
        raise RuntimeError("shapes do not fit")
