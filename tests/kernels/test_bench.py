"""Kernels compile for GPUs that are not here, and are measured, and chosen, as they should be."""

import json
import os
import subprocess
import sys

import pytest
import torch

from babl import kernel_choice
from babl.errors import UserError
from babl.scripts.bench import kernels

FILES = {"rms_norm", "layer_norm", "rope", "glu", "linear_cross_entropy", "attention"}


@pytest.mark.parametrize("sm", [80, 90])
def test_every_kernel_compiles_ahead_of_time_within_registers_and_shared_memory(sm, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [
        sys.executable,
        "-m",
        "babl.scripts.bench",
        "compile",
        "--sm",
        str(sm),
        "--out",
        str(tmp_path / "rows.json"),
    ]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    ours = [row for row in rows if row["by"] == "kernel"]
    assert {row["kernel"].split(".")[0] for row in ours} == FILES and {row["sm"] for row in rows} == {sm}
    liger = {row["operation"] for row in rows if row["by"] == "liger"}
    assert liger == {"rms_norm", "layer_norm", "rope", "glu", "linear_cross_entropy"}
    for row in ours:
        assert 0 < row["registers"] <= 255 and row["shared bytes"] <= 99 * 1024, row  # what any GPU from sm_80 on has
        assert row["spilled bytes"] <= 128, row  # a few numbers of a thread, no tile
        if row["kernel"].startswith("attention"):
            assert row["matrix instructions"] > 0, row


def test_compiling_is_refused_where_the_interpreter_would_take_over():
    if not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("kernels run on the GPU here")
    with pytest.raises(UserError, match="TRITON_INTERPRET is set"):
        kernels.compile_ahead(90)


def test_without_a_gpu_nothing_is_measured():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="there is none"):
        kernels.measure(1)


def test_each_way_of_each_case_computes_the_same_and_is_measured(device, monkeypatch):
    monkeypatch.setattr(kernels, "_liger", dict)  # whose kernels write over their inputs, and are not interpreted
    kernel_choice.use_kernels("off")
    torch.manual_seed(0)
    cases = [
        *kernels.elementwise(4, 16, torch.float32, device),
        kernels.rope(1, 4, 5, 8, torch.float32, device),
        *kernels.attention(1, 2, 9, 16, torch.float32, device, flex=False),
        kernels.loss(3, 4, 20, torch.float32, device),
    ]
    rows = kernels.measure(2, cases)
    assert len(rows) == sum(len(case.ways) for case in cases)
    assert {row["operation"] for row in rows} - {"attention, dropout"} == set(kernel_choice.WIDEST) | {
        "glu",
        "linear_cross_entropy",
    }
    for case in cases:
        if "dropout" not in case.operation:
            want, *others = (way(*case.inputs) for way in case.ways.values())
            for other in others:
                torch.testing.assert_close(other, want, atol=1e-4, rtol=1e-4)
    for row in rows:
        assert row["ms"] > 0 and len(row["all ms"]) == 2


def row(size, by, ms, width=64):
    return {"operation": "attention", "dtype": "bfloat16", "size": size, "width": width, "by": by, "ms": ms}


def test_the_table_has_the_size_from_which_on_the_kernel_is_faster_than_what_ops_has_without_it():
    plain = "sdpa, written out"
    slower_once = [row(128, "kernel", 1), row(128, plain, 2), row(256, "kernel", 3), row(256, plain, 2)]
    faster = [row(512, "kernel", 3), row(512, plain, 4), row(1024, "kernel", 5), row(1024, plain, 9)]
    faster += [row(512, "flex", 2), row(1024, "flex", 2)]  # which ops does not have
    never = [row(512, "kernel", 3, 128), row(512, plain, 1, 128), row(512, "flex", 9, 128)]
    table = kernels.table([*slower_once, *faster, *never], "H9")
    assert table == {"H9": {"attention": {"bfloat16": {"64": 512}}}}
