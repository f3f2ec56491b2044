"""Variants that are published write what transformers writes: greedily and by beams, in a ragged batch."""

import pytest
import torch
import transformers

from babl.generation import Engine, GenerationConfig
from babl.models import from_pretrained
from babl.text import load_tokenizer, train_tokenizer

TEXT = "the small fox reads a long book about old rivers and the town where nobody asks who answers what"
T5 = {"d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
LLAMA = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 256}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
BEYOND = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
VARIANTS = {
    "t5 gated": ("T5", T5),
    "t5 gated silu": ("T5", T5 | {"feed_forward_proj": "gated-silu"}),
    "mt5": ("MT5", T5),
    "umt5": ("UMT5", T5),
    "llama tied": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "llama head width": ("Llama", LLAMA | {"head_dim": 10}),
    "llama biases": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama linear": ("Llama", LLAMA | {"rope_parameters": LINEAR}),
    "llama 3": ("Llama", LLAMA | {"rope_parameters": SCALED | {"original_max_position_embeddings": 32}}),
    "llama dynamic, within its length": ("Llama", LLAMA | {"rope_parameters": BEYOND}),
}
IDS = {"pad_token_id": 0, "eos_token_id": 1}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """transformers' model, and Babl's engine of the folder it saves."""
    family, settings = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("variant")
    size = train_tokenizer([TEXT] * 4, 330, folder).vocab_size
    kind = "ForConditionalGeneration" if family.endswith("T5") else "ForCausalLM"
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(vocab_size=size, **settings, **IDS)
    model = getattr(transformers, family + kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # sharp enough that no two tokens are equally likely
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    eager = {"attn_implementation": "eager"} if family == "UMT5" else {}  # its SDPA sees the tokens after a query
    model = type(model).from_pretrained(folder, **eager).eval()
    return model, Engine(from_pretrained(folder), load_tokenizer(folder))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_ragged_batch_is_answered_as_by_transformers(pair, beams):
    reference, engine = pair
    words = TEXT.split()
    prompts = [" ".join(words[i % 7 : i % 7 + 1 + (5 * i) % 11]) for i in range(8)]
    answers = engine.answer(prompts, GenerationConfig(20, num_beams=beams))
    for ids, answer in zip(engine._encode(prompts), answers, strict=True):
        with torch.inference_mode():
            out = reference.generate(
                torch.tensor([ids]), max_new_tokens=20, do_sample=False, num_beams=beams, pad_token_id=0, eos_token_id=1
            )[0].tolist()
        want = out[1:] if engine.model.is_encoder_decoder else out[len(ids) :]
        assert list(answer.ids) == (want[: want.index(1) + 1] if 1 in want else want)
