import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from babl.models.bloom import Bloom, BloomConfig
from babl.models.llama import Llama, LlamaConfig
from babl.models.t5 import T5, T5Config
from babl.training.recompute import recompute_blocks

SHAPE = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2}
MODELS = {
    "t5": lambda: T5(T5Config(vocab_size=40, dropout_rate=0.3, **SHAPE)),
    "llama": lambda: Llama(LlamaConfig(40, 16, 32, 2, 2, 2, attention_dropout=0.3)),
    "bloom": lambda: Bloom(BloomConfig(40, 16, 2, 2, hidden_dropout=0.3, attention_dropout=0.3)),
}


def gradient_and_work(family, what):
    """The gradient, and the floating-point operations of matrix products in the backward."""
    model = MODELS[family]()
    model.init_weights(torch.Generator().manual_seed(0))
    recompute_blocks(model.train(), what)
    ids, key = torch.arange(24).reshape(2, 12), torch.tensor([3, 4])
    more = {"decoder_input_ids": ids[:, :5]} if model.is_encoder_decoder else {}
    loss = model(ids, dropout_key=key, **more).square().mean()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), counter.get_total_flops()


@pytest.mark.parametrize("family", MODELS)
def test_gradients_are_the_same_and_products_are_computed_twice_only_when_asked(family):
    gradient, work = gradient_and_work(family, "none")
    selective, selective_work = gradient_and_work(family, "selective")
    everything, all_work = gradient_and_work(family, "all")
    assert torch.equal(selective, gradient) and torch.equal(everything, gradient)
    assert selective_work == work < all_work
