import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def file(monkeypatch):
    """The kernel's file, with chunks and blocks so small that there are several."""
    from babl.kernels import linear_cross_entropy as file

    monkeypatch.setattr(file, "CHUNK", 3)
    monkeypatch.setattr(file, "BLOCK", 16)
    return file


def full(x, w, labels, smoothing, z_loss, ignore=-100):
    logits = x @ w.mT
    wide = logits.float()
    counted = labels != ignore
    z = z_loss * (wide.logsumexp(-1).square() * counted).sum()
    return F.cross_entropy(wide, labels, reduction="sum", label_smoothing=smoothing, ignore_index=ignore) + z


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(7, 5, 33), (1, 3, 4), (3, 8, 16), (10, 4, 100)])
def test_loss_and_gradients_equal_the_reference(file, rows, width, vocabulary, smoothing, z_loss, agree, device):
    x, w = torch.randn(rows, width, device=device), 2 * torch.randn(vocabulary, width, device=device)
    labels = torch.randint(vocabulary, (rows,), device=device)
    settings = labels, smoothing, z_loss
    agree(lambda x, w: file.linear_cross_entropy(x, w, *settings), lambda x, w: full(x, w, *settings), x, w)


@pytest.mark.parametrize("ignore", [-100, 5])
def test_rows_to_ignore_give_nothing(file, ignore, agree, device):
    x, w = torch.randn(8, 4, device=device), torch.randn(20, 4, device=device)
    labels = torch.tensor([1, ignore, 3, ignore, ignore, ignore, 19, 0], device=device)
    settings = labels, 0.1, 1e-3, ignore
    agree(lambda x, w: file.linear_cross_entropy(x, w, *settings), lambda x, w: full(x, w, *settings), x, w)
    none = torch.full((8,), ignore, device=device)
    loss = file.linear_cross_entropy(x.requires_grad_(), w, none, 0.1, 1e-3, ignore)
    loss.backward()
    assert loss == 0 and not x.grad.any()


def test_no_rows_are_a_loss_of_zero_with_a_gradient_of_zero(file, device):
    x, w = torch.randn(0, 4, device=device, requires_grad=True), torch.randn(9, 4, device=device, requires_grad=True)
    loss = file.linear_cross_entropy(x, w, torch.empty(0, dtype=torch.int64, device=device))
    loss.backward()
    assert loss == 0 and x.grad.shape == (0, 4) and not w.grad.any()


def test_logits_far_out_stay_finite(file, agree, device):
    x, w = 100 * torch.randn(4, 8, device=device), torch.randn(40, 8, device=device)
    labels = torch.randint(40, (4,), device=device)
    agree(lambda x, w: file.linear_cross_entropy(x, w, labels), lambda x, w: full(x, w, labels, 0.0, 0.0), x, w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_chunks_are_fp32_where_the_model_is_narrower(file, dtype, device):
    rows = torch.randn(90, 8, device=device).to(dtype)
    x, w = rows.requires_grad_(), torch.randn(12, 8, device=device, requires_grad=True)  # weights of fp32: autocast
    labels = torch.randint(12, (90,), device=device)
    loss = file.linear_cross_entropy(x, w, labels)
    want = full(x.float(), w.to(dtype).float(), labels, 0.0, 0.0)
    torch.testing.assert_close(loss, want, rtol=1e-2, atol=1e-2)
    got, want = (torch.autograd.grad(out, (x, w)) for out in (loss, want))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and (a - b).abs().max() <= 1e-2 * b.abs().max()


def test_the_loss_alone_is_the_same_loss(file, device):
    x, w = torch.randn(5, 4, device=device, requires_grad=True), torch.randn(30, 4, device=device)
    labels = torch.randint(30, (5,), device=device)
    with torch.no_grad():
        alone = file.linear_cross_entropy(x, w, labels, 0.1)
    assert torch.equal(alone, file.linear_cross_entropy(x, w, labels, 0.1).detach())


def test_a_chunk_of_logits_is_the_most_there_is(file, device, monkeypatch):
    shapes, launch = [], file._to_gradient

    class Watched:
        def __getitem__(self, grid):
            return lambda logits, *a, **k: shapes.append(tuple(logits.shape)) or launch[grid](logits, *a, **k)

    monkeypatch.setattr(file, "_to_gradient", Watched())
    x, w = torch.randn(7, 4, device=device, requires_grad=True), torch.randn(50, 4, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        file.linear_cross_entropy(x, w, torch.randint(50, (7,), device=device))
    assert shapes == [(3, 50), (3, 50), (1, 50)] and max(saved) <= w.numel()


def test_it_is_one_node_of_a_compiled_graph(file, compiles, device):
    x, w = torch.randn(5, 4, device=device), torch.randn(30, 4, device=device)
    labels = torch.randint(30, (5,), device=device)
    compiles(lambda x, w: file.linear_cross_entropy(x, w, labels, 0.1), x, w)
    arguments = (x.requires_grad_(), w.requires_grad_(), labels, 0.1, 0.0, -100, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(file._linear_cross_entropy, arguments, test_utils=checks)
