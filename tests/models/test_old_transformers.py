"""Folders that Babl saves are the same models to transformers 4.57, which runs in a virtual environment of its own."""

import json
import subprocess

import pytest
import torch
import transformers

from babl.generation import Engine
from babl.models import from_pretrained, save_pretrained
from babl.text import train_tokenizer
from babl.text.prompts import chat_ids

pytestmark = pytest.mark.slow

VOCABULARY = 90
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2}
T5 |= {"num_heads": 4, "decoder_start_token_id": 0}
GATED = T5 | {"feed_forward_proj": "gated-gelu"}
LLAMA = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
SCALED |= {"original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
VARIANTS = {
    "t5 tied": ("T5ForConditionalGeneration", T5 | TIED),
    "t5 untied": ("T5ForConditionalGeneration", T5 | UNTIED),
    "t5 gated tied": ("T5ForConditionalGeneration", GATED | TIED),
    "t5 gated untied": ("T5ForConditionalGeneration", GATED | UNTIED),
    "t5 gated silu": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-silu"} | UNTIED),
    "mt5": ("MT5ForConditionalGeneration", GATED | UNTIED),
    "umt5": ("UMT5ForConditionalGeneration", GATED | UNTIED),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama tied": ("LlamaForCausalLM", LLAMA | TIED),
    "llama head width": ("LlamaForCausalLM", LLAMA | {"head_dim": 10}),
    "llama attention bias": ("LlamaForCausalLM", LLAMA | {"attention_bias": True}),
    "llama mlp bias": ("LlamaForCausalLM", LLAMA | {"mlp_bias": True}),
    "llama linear": ("LlamaForCausalLM", LLAMA | {"rope_parameters": LINEAR}),
    "llama dynamic": ("LlamaForCausalLM", LLAMA | {"rope_parameters": DYNAMIC}),
    "llama 3": ("LlamaForCausalLM", LLAMA | {"rope_parameters": SCALED}),
    "bloom": ("BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
}  # fmt: skip
# Reads a list of [class, folder, inputs]; writes what the older transformers computes of each.
READ = """
import json, sys, torch, transformers
found = {"version": transformers.__version__}
for name, kind, folder, inputs in json.load(open(sys.argv[1])):
    model, info = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], (name, info)
    with torch.no_grad():
        found[name] = model.eval()(**{k: torch.tensor(v) for k, v in inputs.items()}).logits
torch.save(found, sys.argv[2])
"""
CHAT = """
import json, sys, torch, transformers
folder, conversation = sys.argv[1], json.loads(sys.argv[2])
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
out = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0].tolist()
print(json.dumps([ids, out[len(ids):]]))
"""
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def made(kind, settings):
    """transformers' model, in which no weight or bias can be mistaken for another."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)
    model = model(model.config_class(**settings)).eval()
    with torch.no_grad():
        if "tie_word_embeddings" in settings and not settings["tie_word_embeddings"]:
            model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 32))
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def inputs(kind):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (2, 50), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, 41:] = 0
    given = {"input_ids": ids * mask, "attention_mask": mask}
    if "Conditional" in kind:
        given["decoder_input_ids"] = torch.randint(2, VOCABULARY, (2, 12), generator=draw)
    return given


@pytest.fixture(scope="module")
def logits(old_python, tmp_path_factory):
    """(Babl's, transformers 4.57's) by variant, of folders that Babl has saved."""
    home, ours, cases = tmp_path_factory.mktemp("variants"), {}, []
    for name, (kind, settings) in VARIANTS.items():
        made(kind, settings).save_pretrained(home / f"{name} as made")
        model = from_pretrained(home / f"{name} as made")
        save_pretrained(model, home / name)
        with torch.no_grad():
            ours[name] = model(**inputs(kind))
        cases.append([name, kind, str(home / name), {key: value.tolist() for key, value in inputs(kind).items()}])
    (home / "cases.json").write_text(json.dumps(cases))
    subprocess.run([old_python, "-c", READ, home / "cases.json", home / "theirs.pt"], check=True)
    theirs = torch.load(home / "theirs.pt")
    assert theirs.pop("version") == "4.57.6"
    return {name: (ours[name], theirs[name]) for name in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_folder_gives_the_same_logits(logits, name):
    got, want = logits[name]
    seen = inputs(VARIANTS[name][0])["attention_mask"].bool() if got.shape[1] == 50 else ...
    assert (got - want)[seen].abs().max() < 1e-5 * want[seen].abs().max()


def test_a_saved_folder_has_the_same_chat_ids_and_greedy_answer(old_python, tmp_path):
    size = train_tokenizer(["who reads the long book in the old town"] * 3, 300, tmp_path / "made").vocab_size
    settings = json.loads((tmp_path / "made" / "tokenizer_config.json").read_text())
    (tmp_path / "made" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    sizes = {"vocab_size": size, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 1}
    made("LlamaForCausalLM", LLAMA | sizes).save_pretrained(tmp_path / "made")
    engine = Engine.load(tmp_path / "made", "cpu", "float32")
    save_pretrained(from_pretrained(tmp_path / "made"), tmp_path / "saved")
    engine.tokenizer.save(tmp_path / "saved")
    said = ("who reads", "the long book ", " in the old  town?", "née", "who?")
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, said, strict=False)]
    command = [old_python, "-c", CHAT, tmp_path / "saved", json.dumps(turns)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    ids, written = json.loads(done.stdout.splitlines()[-1])
    assert chat_ids(turns, engine.tokenizer) == ids
    assert list(engine.answer([ids])[0].ids[:20]) == written
