import pytest
import torch

from babl import ops


def angles(batch, length, width, device):
    return (torch.randn(batch, 1, length, width // 2, device=device) * 9).repeat(1, 1, 1, 2)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "width"),
    [(2, 3, 1, 5, 10), (1, 4, 4, 1, 64), (2, 4, 2, 7, 128), (1, 1, 1, 3, 2)],
)
@pytest.mark.parametrize("shared", [True, False], ids=["positions of all", "positions of each"])
def test_queries_and_keys_turn_as_the_reference(batch, heads, kv_heads, length, width, shared, agree, device):
    from babl.kernels.rope import rope

    turn = angles(1 if shared else batch, length, width, device)
    q = torch.randn(batch, length, heads, width, device=device)  # as a linear layer gives them
    k = torch.randn(batch, length, kv_heads, width, device=device)

    def over(fn):
        return lambda q, k: fn(q.transpose(1, 2), k.transpose(1, 2), turn.cos(), turn.sin())

    agree(over(rope), over(ops.rope), q, k)


def test_to_turn_and_turn_back_is_to_stand_still(device):
    from babl.kernels.rope import rope

    q, k, turn = torch.randn(2, 3, 6, 8, device=device), torch.randn(2, 1, 6, 8, device=device), angles(2, 6, 8, device)
    there = rope(q, k, turn.cos(), turn.sin())
    torch.testing.assert_close(rope(*there, turn.cos(), -turn.sin()), (q, k))


def test_dtypes_are_those_of_the_reference(agree, device):
    from babl.kernels.rope import rope

    q, k = (torch.randn(1, 2, 5, 16, device=device).bfloat16() for _ in range(2))
    for dtype in (torch.bfloat16, torch.float32):
        turn = angles(1, 5, 16, device)
        cos, sin = turn.cos().to(dtype), turn.sin().to(dtype)
        agree(lambda q, k: rope(q, k, cos, sin), lambda q, k: ops.rope(q, k, cos, sin), q, k, tolerance=2e-2)  # noqa: B023


def test_it_is_one_node_of_a_compiled_graph(compiles, device):
    from babl.kernels.rope import _rope, rope

    turn = angles(1, 5, 16, device)
    q, k = torch.randn(2, 3, 5, 16, device=device), torch.randn(2, 1, 5, 16, device=device)
    compiles(lambda q, k: rope(q, k, turn.cos(), turn.sin()), q, k)
    arguments = q.requires_grad_(), k, turn.cos(), turn.sin(), torch.float32, torch.float32, False
    torch.library.opcheck(_rope, arguments)
