import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from babl.data.collate import CausalFeature, collate_causal
from babl.models import from_pretrained
from babl.training.loss import token_loss

MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=4)),
}


@pytest.mark.parametrize("family", MODELS)
def test_the_loss_of_a_decoder_shifts_once_and_leaves_out_the_prompt_as_transformers_does(family, tmp_path):
    torch.manual_seed(0)
    theirs = MODELS[family]().eval()
    theirs.save_pretrained(tmp_path)
    features = [CausalFeature("a", [5, 6, 7], [8, 9, 1]), CausalFeature("b", [5], [9, 1]), CausalFeature("c", [4], [1])]
    batch = collate_causal(features, [1, 2, 3])
    loss = token_loss(from_pretrained(tmp_path), batch) / batch.targets

    rows = [f.source + f.target for f in features]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor(
        [[-100] * len(f.source) + f.target + [-100] * (width - len(r)) for f, r in zip(features, rows, strict=True)]
    )
    expected = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
