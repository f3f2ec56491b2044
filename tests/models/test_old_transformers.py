"""Folders that Babl saves are the same models to transformers 4.57, which runs in a virtual environment of its own."""

import json
import subprocess

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from babl.generation import Engine
from babl.models import from_pretrained, save_pretrained
from babl.text import load_tokenizer, train_tokenizer
from babl.text.prompts import chat_ids

pytestmark = pytest.mark.slow

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
T5 = {"vocab_size": 90, "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CHAT = """
import json, sys, torch, transformers
folder, conversation = sys.argv[1], json.loads(sys.argv[2])
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
out = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0].tolist()
print(json.dumps([ids, out[len(ids):]]))
"""
LOGITS = """
import json, sys, torch, transformers
model = transformers.T5ForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.tensor([json.loads(sys.argv[2])])
with torch.no_grad():
    print(json.dumps(model(input_ids=ids, decoder_input_ids=ids).logits.tolist()))
"""
IDS = """
import json, sys
from transformers import AutoTokenizer
found = []
for folder in json.loads(sys.argv[1]):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found.append([tokenizer(text, add_special_tokens=False)["input_ids"] for text in json.loads(sys.argv[2])])
print(json.dumps(found))
"""
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def made(kind, settings):
    """transformers' model, in which no weight or bias can be mistaken for another."""
    torch.manual_seed(0)
    model = kind(kind.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def output_of(python, program, *arguments):
    done = subprocess.run([python, "-c", program, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_saved_folder_has_the_same_chat_ids_and_greedy_answer(old_python, tmp_path):
    size = train_tokenizer(["who reads the long book in the old town"] * 3, 300, tmp_path / "made").vocab_size
    settings = json.loads((tmp_path / "made" / "tokenizer_config.json").read_text())
    (tmp_path / "made" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    sizes = {"vocab_size": size, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 1}
    made(transformers.LlamaForCausalLM, LLAMA | sizes).save_pretrained(tmp_path / "made")
    engine = Engine.load(tmp_path / "made", "cpu", "float32")
    save_pretrained(from_pretrained(tmp_path / "made"), tmp_path / "saved")
    engine.tokenizer.save(tmp_path / "saved")
    said = ("who reads", "the long book ", " in the old  town?", "née", "who?")
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, said, strict=False)]
    ids, written = output_of(old_python, CHAT, tmp_path / "saved", json.dumps(turns))
    assert chat_ids(turns, engine.tokenizer) == ids
    assert list(engine.answer([ids])[0].ids[:20]) == written


def test_a_t5_whose_embedding_is_kept_under_the_decoders_name_has_a_head_of_its_own(old_python, tmp_path):
    """As google/madlad400-3b-mt is published; transformers 5.17 takes the head for the embedding there."""
    made(transformers.T5ForConditionalGeneration, T5).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["decoder.embed_tokens.weight"] = weights.pop("shared.weight")
    weights["lm_head.weight"] = torch.randn(90, 32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = list(range(3, 40))
    want = torch.tensor(output_of(old_python, LOGITS, tmp_path, json.dumps(ids)))
    with torch.no_grad():
        got = from_pretrained(tmp_path)(torch.tensor([ids]), decoder_input_ids=torch.tensor([ids]))
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_spaces_stand_where_tokenizer_json_puts_them_whatever_legacy_says(old_python, shared, tmp_path):
    spec = json.loads((shared / "checkpoints" / "stories260K" / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    old = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    new = {"type": "Metaspace", "replacement": "▁", "split": False}
    forms = [(old, None), *((None, new | {"prepend_scheme": scheme}) for scheme in ("always", "first", "never"))]
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    folders = []
    for normalizer, pre_tokenizer in forms:
        for legacy in ({}, {"legacy": True}, {"legacy": False}):
            folders.append(tmp_path / str(len(folders)))
            folders[-1].mkdir()
            changed = spec | {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
            (folders[-1] / "tokenizer.json").write_text(json.dumps(changed))
            (folders[-1] / "tokenizer_config.json").write_text(json.dumps(ends | legacy))
    texts = ["who reads?", "the  fox ", "<s>who</s><s> reads </s>the fox", "a</s>\nb"]
    wanted = output_of(old_python, IDS, json.dumps([str(folder) for folder in folders]), json.dumps(texts))
    for folder, want in zip(folders, wanted, strict=True):
        ours = load_tokenizer(folder)
        assert [ours.encode_chat(text) for text in texts] == want
        assert ours.encode_batch(texts[:2]) == want[:2]
