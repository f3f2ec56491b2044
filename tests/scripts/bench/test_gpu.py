"""What a training step is said to cost is what its products cost; without a GPU nothing is timed."""

from functools import partial

import pytest
import torch

from babl.distributed.backend import DistributedConfig, make_backend
from babl.distributed.env import world
from babl.models.llama import Llama, LlamaConfig
from babl.models.t5 import T5, T5Config
from babl.scripts.bench import gpu
from babl.scripts.bench.__main__ import main
from babl.training.optimizer import OptimConfig, make_optimizer


def test_the_products_of_a_step_are_counted_as_one_counts_them_by_hand():
    """Raffel et al.'s two stacks, by the sizes alone: two operations a weight and token, a backward of two forwards."""
    width, inner, feed_forward, vocabulary, source, target, examples = 24, 32, 40, 31_000, 384, 16, 2
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_ff=feed_forward, d_kv=16, num_heads=2, num_layers=1,
        num_decoder_layers=1,
    )  # fmt: skip
    projections, mlp = 4 * width * inner, 2 * width * feed_forward
    encoder = source * (projections + mlp) + 2 * source * source * inner
    cross = 2 * target * width * inner + 2 * source * width * inner + 2 * target * source * inner
    decoder = target * (projections + mlp) + 2 * target * target * inner + cross
    by_hand = 3 * 2 * examples * (encoder + decoder + target * width * vocabulary)
    model = T5(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with world() as me:
        backend = make_backend(DistributedConfig(), me, bf16=False)
        backend.setup(model.train(), partial(make_optimizer, cfg=OptimConfig()))
        batch = gpu._batch(gpu.Work(config, examples), encoder_decoder=True)
        assert gpu._flops(backend, batch) == by_hand


def test_attention_whose_heads_share_keys_is_counted_as_without_sharing():
    """Ainslie et al. 2023: grouped queries share what is stored, and save no product."""
    sizes = {"vocab_size": 31_000, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    length, heads, width = 384 + 16 - 1, 4, 4
    by_kv_heads = []
    for shared in (1, 4):
        config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=shared)
        model = Llama(config)
        model.init_weights(torch.Generator().manual_seed(0))
        with world() as me:
            backend = make_backend(DistributedConfig(), me, bf16=False)
            backend.setup(model.train(), partial(make_optimizer, cfg=OptimConfig()))
            batch = gpu._batch(gpu.Work(config, 1), encoder_decoder=False)
            weights = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("blocks"))
            rest = 2 * length * weights + 2 * 16 * 16 * 31_000  # layers, and the head at the answer's places
            by_kv_heads.append(gpu._flops(backend, batch) // 3 - rest)
    assert by_kv_heads[0] == by_kv_heads[1] == 2 * 2 * heads * length * length * width


def test_without_a_gpu_a_step_is_not_timed(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["gpu", "--model", "t5-base"]) == 2
    assert "measured on a GPU, and there is none" in capsys.readouterr().err
