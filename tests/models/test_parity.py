"""Every variant that Babl computes beside transformers, on random weights: one row of the table in docs/models.md each.

The table itself: `python -m pytest -s -m slow tests/models/test_parity.py`.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode

from babl.generation import Engine, GenerationConfig
from babl.models import from_pretrained, save_pretrained
from babl.models.weights import FAMILIES
from babl.text import load_tokenizer, train_tokenizer

WORDS = "the small fox reads a long book about old rivers and the town where nobody asks who answers what"
IDS = {"pad_token_id": 0, "eos_token_id": 1}
T5 = {"d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4} | IDS
T5 |= {"decoder_start_token_id": 0}
GATED = T5 | {"feed_forward_proj": "gated-gelu"}
LLAMA = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4} | IDS
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 128}
BLOOM = {"n_layer": 2} | IDS
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
LLAMA3 |= {"original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
# Of each variant, transformers' family and what its config says beside the size of the vocabulary.
VARIANTS = {
    "T5 v1.0: ReLU, tied head": ("T5", T5 | TIED),
    "T5 v1.0, head of its own": ("T5", T5 | UNTIED),
    "T5 v1.1: gated GELU, head of its own": ("T5", GATED | UNTIED),
    "T5 gated GELU, tied head": ("T5", GATED | TIED),
    "T5 gated SiLU": ("T5", T5 | {"feed_forward_proj": "gated-silu"} | UNTIED),
    "ByT5: deep encoder, bytes": ("T5", GATED | {"num_decoder_layers": 1} | UNTIED),
    "mT5": ("MT5", GATED | UNTIED),
    "mT5, tied head": ("MT5", GATED | TIED),
    "UMT5: position biases in every block": ("UMT5", GATED | UNTIED),
    "UMT5, tied head": ("UMT5", GATED | TIED),
    "LLaMA, as many key heads as heads": ("Llama", LLAMA | {"num_key_value_heads": 4}),
    "LLaMA 2 and 3, grouped heads": ("Llama", LLAMA),
    "LLaMA, tied head": ("Llama", LLAMA | TIED),
    "LLaMA, width of a head": ("Llama", LLAMA | {"head_dim": 10}),
    "LLaMA, attention biases": ("Llama", LLAMA | {"attention_bias": True}),
    "LLaMA, MLP biases": ("Llama", LLAMA | {"mlp_bias": True}),
    "LLaMA, linear rope": ("Llama", LLAMA | {"rope_parameters": LINEAR}),
    "LLaMA, dynamic rope": ("Llama", LLAMA | {"rope_parameters": DYNAMIC}),
    "LLaMA 3.1, its rope": ("Llama", LLAMA | {"rope_parameters": LLAMA3}),
    "BLOOM, 8 heads": ("Bloom", BLOOM | {"hidden_size": 32, "n_head": 8}),
    "BLOOM, 12 heads": ("Bloom", BLOOM | {"hidden_size": 48, "n_head": 12}),
}
ENCODER_DECODERS = ("T5", "MT5", "UMT5")
NEW, BEAMS = 16, 3
HEAD = "| variant | logits | gradients | greedy | 3 beams | saved: 5.17 | saved: 4.57 |\n|:--|--:|--:|--:|--:|--:|--:|"
# Reads [class, folder, inputs, prompts] of each variant; writes its logits and what it answers greedily.
READ = """
import json, sys, torch, transformers
found = {"version": transformers.__version__}
with open(sys.argv[1]) as file:
    cases = json.load(file)
for name, (kind, folder, inputs, prompts, new) in cases.items():
    model, info = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], (name, info)
    model.eval()
    with torch.no_grad():
        logits = model(**{key: torch.tensor(value) for key, value in inputs.items()}).logits
        out = [model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)[0] for ids in prompts]
    read = [1 if model.config.is_encoder_decoder else len(ids) for ids in prompts]
    found[name] = logits, [row[start:].tolist() for row, start in zip(out, read)]
torch.save(found, sys.argv[2])
"""


class Unrounded(TorchFunctionMode):
    """Within it, what is float64 is not cast to float32, as transformers' norms and softmaxes would."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if arguments and isinstance(arguments[0], torch.Tensor) and arguments[0].dtype == torch.float64:
            if function is torch.Tensor.float:
                return arguments[0]
            arguments = [torch.float64 if each is torch.float32 else each for each in arguments]
            options = {key: torch.float64 if each is torch.float32 else each for key, each in options.items()}
        return function(*arguments, **options)


@dataclass
class Row:
    """What one variant's comparison gave: differences relative to the largest value, and how many answers are equal."""

    logits: float
    gradients: float
    greedy: int
    beams: int
    saved: float  # logits of transformers 5 from the folder that Babl has saved
    ours: torch.Tensor
    answers: list[list[int]]
    prompts: list[list[int]]
    folder: Path

    def check(self):
        assert self.logits < 1e-5 and self.gradients < 1e-5 and self.saved < 1e-5, self
        assert self.greedy == self.beams == len(self.prompts), self

    def line(self, name, old="–"):
        numbers = [f"{value:.0e}" for value in (self.logits, self.gradients)]
        numbers += [f"{equal}/{len(self.prompts)}" for equal in (self.greedy, self.beams)]
        again = f"{self.saved:.0e}" if self.saved else "same"
        return f"| {' | '.join([name, *numbers, again, old])} |"


def model_class(family):
    return getattr(transformers, family + ("ForConditionalGeneration" if family in ENCODER_DECODERS else "ForCausalLM"))


def write_tokenizer(name, folder):
    """The folder has ByT5's tokenizer or a small one; returns the size of its vocabulary."""
    if "bytes" not in name:
        return train_tokenizer([WORDS] * 4, 330, folder).vocab_size
    transformers.ByT5Tokenizer().save_pretrained(folder)
    return 384


def write(name, folder):
    """The folder has the variant as transformers writes it, with values of which none can be mistaken for another."""
    family, settings = VARIANTS[name]
    size = write_tokenizer(name, folder)
    torch.manual_seed(6)  # where no two tokens are so nearly alike that rounding chooses
    kind = model_class(family)
    model = kind(kind.config_class(vocab_size=size, **settings))
    with torch.no_grad():
        if family in ENCODER_DECODERS and settings["tie_word_embeddings"] is False:
            model.lm_head.weight = torch.nn.Parameter(torch.randn(size, 32) * 0.5)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)


def theirs(family, folder, dtype=torch.float32):
    # With SDPA, the decoder of transformers 5.17's UMT5 sees the tokens after a query.
    model, info = model_class(family).from_pretrained(
        folder, dtype=dtype, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    if family == "UMT5":  # 5.17 takes every head for tied, and scales its input; 4.57 and T5X do so where it is
        model.config.tie_word_embeddings = model.lm_head.weight is model.shared.weight
    return model.eval()


def batch(family, size):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, size, (2, 50), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, 41:] = 0
    given = {"input_ids": ids * mask, "attention_mask": mask}
    if family in ENCODER_DECODERS:
        given["decoder_input_ids"] = torch.randint(2, size, (2, 12), generator=draw)
    return given, mask.bool() if family not in ENCODER_DECODERS else ...


def apart(got, want, seen=...):
    return ((got - want)[seen].abs().max() / want[seen].abs().max()).item()


def computed(family, reference, model):
    """Returns transformers' logits, Babl's, and how far gradients of the same loss lie apart."""
    given, seen = batch(family, model.config.vocab_size)
    want, got = reference(**given).logits, model(**given)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=want.dtype)
    for logits in (want, got):
        (logits * weights)[seen].sum().backward()
    keys, by_name = FAMILIES[model.config.model_type].hf_keys(model.config), dict(reference.named_parameters())
    largest = max(parameter.grad.abs().max() for parameter in by_name.values())
    different = [(p.grad - by_name[keys[own]].grad).abs().max() / largest for own, p in model.named_parameters()]
    assert len(different) == len(by_name)
    return want.detach(), got.detach(), max(different).item()


def written(model, ids, beams):
    """What transformers writes for one prompt, the end included."""
    out = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, num_beams=beams)[0]
    return out[1 if model.config.is_encoder_decoder else len(ids) :].tolist()


def compare(name, home):
    """Returns the row of a variant; in `home` lies then its folder as transformers writes it, and as Babl does."""
    family = VARIANTS[name][0]
    write(name, home / "made")
    made = home / "made"
    reference, model, tokenizer = theirs(family, made), from_pretrained(made), load_tokenizer(made)
    want, got, gradients = computed(family, reference, model)
    given, seen = batch(family, model.config.vocab_size)
    save_pretrained(model, home / "saved")
    tokenizer.save(home / "saved")
    with torch.no_grad():
        again = theirs(family, home / "saved")(**given).logits
    words = WORDS.split()
    prompts = tokenizer.encode_batch([" ".join(words[i % 5 : i % 5 + 1 + 7 * i % 11]) for i in range(8)])
    engine, answers, equal = Engine(model, tokenizer), {}, {}
    for beams in (1, BEAMS):
        answers[beams] = [list(a.ids) for a in engine.answer(prompts, GenerationConfig(NEW, num_beams=beams))]
        expected = [written(reference, prompt, beams) for prompt in prompts]
        equal[beams] = sum(ids == other for ids, other in zip(answers[beams], expected, strict=True))
    return Row(
        logits=apart(got, want, seen), gradients=gradients, greedy=equal[1], beams=equal[BEAMS],
        saved=apart(again, want, seen), ours=got, answers=answers[1], prompts=prompts, folder=home / "saved",
    )  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_computes_learns_and_writes_as_in_transformers(name, tmp_path):
    row = compare(name, tmp_path)
    print(f"\n{HEAD}\n{row.line(name)}")
    row.check()


@pytest.mark.parametrize("name", VARIANTS)
def test_in_double_precision_without_casts_they_are_nearer_still(name, tmp_path):
    family = VARIANTS[name][0]
    write(name, tmp_path)
    reference, model = theirs(family, tmp_path, torch.float64), from_pretrained(tmp_path, torch.float64)
    with Unrounded():
        want, got, gradients = computed(family, reference, model)
    bound = 1e-6 if family == "Bloom" else 1e-12  # transformers makes ALiBi's biases in float32
    assert apart(got, want, batch(family, got.shape[-1])[1]) < bound and gradients < bound


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decoding_gives_the_logits_of_the_whole(name, tmp_path):
    write(name, tmp_path)
    model = from_pretrained(tmp_path, torch.float64)
    given, _ = batch(VARIANTS[name][0], model.config.vocab_size)
    ids = given.get("decoder_input_ids", given["input_ids"])[1:]
    read, mask = given["input_ids"][1:, :20], given["attention_mask"][1:, :20]
    first = 1 if "decoder_input_ids" in given else 20
    with torch.no_grad():
        if first == 1:
            ids[:, 0] = model.config.decoder_start_token_id
            whole = model(read, mask, decoder_input_ids=ids)
        else:
            whole = model(ids)[:, first - 1 :]
        cache, state = model.prefill(read, mask, ids.shape[1])
        states = [state]
        for at in range(first, ids.shape[1]):
            states.append(model.decode(ids[:, at : at + 1], cache)[:, 0])
        logits = model.head(torch.stack(states, 1))
    assert (logits - whole).abs().max() < 1e-9 * whole.abs().max()


@pytest.mark.slow
def test_folders_that_babl_saves_are_the_same_models_to_both_transformers(old_python, tmp_path):
    rows = {name: compare(name, tmp_path / str(number)) for number, name in enumerate(VARIANTS)}
    cases = {}
    for name, row in rows.items():
        family = VARIANTS[name][0]
        given, _ = batch(family, row.ours.shape[-1])
        inputs = {key: value.tolist() for key, value in given.items()}
        cases[name] = [model_class(family).__name__, str(row.folder), inputs, row.prompts, NEW]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    subprocess.run([old_python, "-c", READ, tmp_path / "cases.json", tmp_path / "found.pt"], check=True)
    found = torch.load(tmp_path / "found.pt")
    assert found.pop("version") == "4.57.6"
    lines, differences = [HEAD], {}
    for name, row in rows.items():
        logits, _ = found[name]
        differences[name] = apart(row.ours, logits, batch(VARIANTS[name][0], logits.shape[-1])[1])
        lines.append(row.line(name, f"{differences[name]:.0e}"))
    print("", *lines, sep="\n")
    for name, row in rows.items():
        row.check()
        assert differences[name] < 1e-5 and found[name][1] == row.answers, name


def test_the_table_in_the_documentation_has_every_variant():
    table = (Path(__file__).parent.parent.parent / "docs" / "models.md").read_text()
    assert [line.split(" | ")[0][2:] for line in table.splitlines() if line.startswith("| ")][1:] == list(VARIANTS)
