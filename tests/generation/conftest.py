"""Tiny models of every family in folders, with a tokenizer of their own."""

import json

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from babl.generation import Engine
from babl.models import from_pretrained
from babl.text import load_tokenizer, train_tokenizer

WORDS = "the small fox reads a long book about old rivers and the town where nobody asks who answers what"
IDS = {"pad_token_id": 0, "eos_token_id": 1}
MODELS = {
    "t5": lambda v: T5ForConditionalGeneration(
        T5Config(vocab_size=v, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "llama": lambda v: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=v, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, **IDS,
        )
    ),
    "bloom": lambda v: BloomForCausalLM(BloomConfig(vocab_size=v, hidden_size=48, n_layer=2, n_head=6, **IDS)),
}  # fmt: skip


@pytest.fixture(scope="session", params=MODELS)
def reference(request, tmp_path_factory):
    """A transformers model; its folder is in `name_or_path`. More rows than tokens, and an EOS that comes sometimes."""
    folder = tmp_path_factory.mktemp(request.param)
    size = train_tokenizer([WORDS] * 4, 330, folder).vocab_size
    torch.manual_seed(3)
    model = MODELS[request.param](size).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # sharp enough that no two tokens are equally likely
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    model.name_or_path = str(folder)
    return model


@pytest.fixture(scope="session")
def engine(reference):
    """Babl's engine with the same weights."""
    return Engine(from_pretrained(reference.name_or_path), load_tokenizer(reference.name_or_path))


@pytest.fixture(scope="session")
def prompts():
    """Sixteen of unequal lengths."""
    words = WORDS.split()
    return [" ".join(words[i % 7 : i % 7 + 1 + (5 * i) % 11]) for i in range(16)]


@pytest.fixture(scope="session")
def expected(reference, engine):
    """A function: what transformers writes for prompts, as ids without padding, the final EOS included."""

    def generate(prompts, **settings):
        sources = engine._encode(prompts)
        width = max(map(len, sources))
        decoder = not engine.model.is_encoder_decoder
        pads = [[0] * (width - len(s)) for s in sources]
        ids = [p + s if decoder else s + p for s, p in zip(sources, pads, strict=True)]
        ones = [[1] * len(s) for s in sources]
        mask = [p + o if decoder else o + p for o, p in zip(ones, pads, strict=True)]
        out = reference.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            pad_token_id=0,
            eos_token_id=1,
            **settings,
        )
        rows = out[:, width if decoder else 1 :].tolist()
        return [tuple(row[: row.index(1) + 1] if 1 in row else row) for row in rows]

    return generate


@pytest.fixture(scope="session")
def stories(shared):
    """An engine with the trained checkpoint beside the project."""
    folder = shared / "checkpoints" / "stories260K"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    return Engine(from_pretrained(folder), load_tokenizer(folder))
