"""A model that is broken, or asked for what it cannot do, says so; it never gives an answer for one."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from babl import cli
from babl.data.contexts import View
from babl.errors import UserError
from babl.evaluation.predictions import PromptLimits, predict
from babl.generation import Engine, GenerationConfig
from babl.models import from_pretrained
from babl.text import load_tokenizer
from babl.text.prompts import qa_prompt

SETTINGS = [{}, {"temperature": 1.0}, {"num_beams": 2}, {"repetition_penalty": 1.3}]
NORMS = ("decoder.final_layer_norm.weight", "model.norm.weight", "transformer.ln_f.weight")
HEADS = ("lm_head.weight", "shared.weight", "transformer.word_embeddings.weight")
UNWRITTEN = 250  # a token that is in no prompt here


@pytest.fixture(
    scope="module",
    params=[(NORMS, 0, math.nan), (NORMS, 0, math.inf)] + [(HEADS, UNWRITTEN, s * math.inf) for s in (1, -1)],
)
def broken(request, reference, tmp_path_factory):
    """A folder with one such number, as an overflow in training leaves it; the head's row has a logit of each sign."""
    names, row, value = request.param
    folder = tmp_path_factory.mktemp("broken")
    reference.save_pretrained(folder)
    load_tokenizer(reference.name_or_path).save(folder)
    weights = load_file(folder / "model.safetensors")
    weight = weights[next(name for name in names if name in weights)]
    weight.view(len(weight), -1)[row, 0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_that_are_no_numbers_end_the_answer_with_an_error_that_names_the_model(broken, settings):
    engine = Engine.load(broken, "cpu", "float32")
    for prompts in (["who reads"], ["the fox"], ["who reads", "the fox"]):
        with pytest.raises(FloatingPointError, match=r"broken\d+: logits after 0 tokens of the answer are not finite"):
            engine.generate(prompts, max_new_tokens=4, **settings)


def test_nor_are_they_scored_or_echoed(broken):
    engine = Engine.load(broken, "cpu", "float32")
    with pytest.raises(FloatingPointError, match="after 0 tokens of the answer are not finite"):
        engine.score(["who reads"], ["the fox"])
    if not engine.model.is_encoder_decoder:
        with pytest.raises(FloatingPointError, match="after 1 tokens of the prompt are not finite"):
            engine.answer(["who reads"], GenerationConfig(likeliest=1, echo=True))


@pytest.mark.parametrize("beams", [1, 3])
def test_the_error_counts_the_tokens_before_the_step_that_failed(reference, engine, beams):
    """A number that is none is met by who writes a certain token, which the best answer begins with."""
    if reference.config.tie_word_embeddings:
        return  # there every step has its logit
    first = engine.answer(["who reads"], GenerationConfig(2, num_beams=beams))[0].ids[0]
    model = from_pretrained(reference.name_or_path)
    with torch.no_grad():
        model.embed.weight[first] = math.nan
    with pytest.raises(FloatingPointError, match="the model: logits after 1 tokens of the answer are not finite"):
        Engine(model, engine.tokenizer).generate(["who reads"], max_new_tokens=2, num_beams=beams)


def test_the_commands_exit_with_one_and_write_no_score(broken, tmp_path, capsys):
    data = tmp_path / "dev.jsonl"
    rows = [{"question": f"who reads {n}", "context": "the fox reads", "answer": "fox"} for n in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    for arguments in (
        ["generate", str(broken), "the fox", "--max-new-tokens", "3"],
        ["query", str(broken), "who reads", "--context", "the fox reads", "--json"],
        ["evaluate", str(broken), str(data), "--max-new-tokens", "3", "--out", str(out)],
    ):
        assert cli.main(arguments) == 1
        said = capsys.readouterr()
        assert "are not finite" in said.err and not said.out.strip()
    assert not (out / "metrics.json").exists()


def test_an_infinite_hook_is_no_fault_of_the_model(engine):
    """Forbidding tokens sets their logits to minus infinity, which leaves a distribution."""
    forbidden = Engine(engine.model, engine.tokenizer)
    forbidden.hook = lambda logits: logits.index_fill(-1, torch.tensor([3, 4]), -torch.inf)
    assert len(forbidden.generate(["who reads"], max_new_tokens=3)) == 1


def test_an_empty_prompt_is_refused_alone_and_in_a_batch_where_nothing_begins_a_text(engine):
    if engine.model.is_encoder_decoder:
        return  # T5 reads EOS
    for prompts in ([""], ["", "who"], [[]]):
        with pytest.raises(UserError, match="the prompt is empty, and the model has no token that begins a text"):
            engine.generate(prompts, max_new_tokens=2)
        with pytest.raises(UserError, match="the prompt is empty, and the model has no token that begins a text"):
            engine.score(prompts, ["the fox"] * len(prompts))


def test_nothing_asked_is_nothing_answered(engine):
    assert engine.generate([]) == engine.score([], []) == []


@pytest.mark.parametrize("ids", [[5, -1], [5, 10**6]])
def test_an_id_that_the_model_does_not_have_is_named(engine, ids):
    with pytest.raises(UserError, match=f"the prompt has token id {ids[1]}, expected 0 to"):
        engine.generate([ids], max_new_tokens=2)


def test_a_text_in_place_of_a_list_is_refused(engine):
    with pytest.raises(UserError, match=r"prompts is one text, 'who reads'; expected a list of them"):
        engine.generate("who reads")
    with pytest.raises(UserError, match=r"stop_strings is one text, 'fox'; expected a list of them"):
        engine.generate(["who reads"], stop_strings="fox")


def test_each_prompt_that_is_scored_has_one_continuation(engine):
    for prompts, continuations in ((["who"], ["fox", "town"]), (["who", "what"], ["fox"])):
        with pytest.raises(
            UserError, match=f"{len(continuations)} continuations, expected {len(prompts)}, one a prompt"
        ):
            engine.score(prompts, continuations)


def test_a_pad_token_beyond_the_models_rows_changes_nothing(reference, prompts, tmp_path):
    """Tokenizers were given a pad token after the model was made: its id is the number of the model's rows."""
    load_tokenizer(reference.name_or_path).save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    rows = reference.config.vocab_size
    spec["added_tokens"].append(
        {"id": rows, "content": "[PAD]", "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"pad_token": "[PAD]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    padded = Engine(from_pretrained(reference.name_or_path), load_tokenizer(tmp_path))
    plain = Engine(from_pretrained(reference.name_or_path), load_tokenizer(reference.name_or_path))
    assert padded.tokenizer.pad_id == rows
    assert padded.generate(prompts, max_new_tokens=5) == plain.generate(prompts, max_new_tokens=5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prompt_lookup_num_tokens": 6},
        {"temperature": 0.8, "top_k": 20, "seed": 1},
        {"repetition_penalty": 1.6},
        {"num_beams": 3, "repetition_penalty": 1.6},
        {"num_beams": 3, "length_penalty": 2.0, "stop_strings": ["e", "o", "a"]},
    ],
    ids=str,
)
def test_the_probability_of_an_answer_is_that_of_its_tokens_however_they_were_chosen(
    reference, engine, prompts, settings
):
    answers = engine.answer(prompts[:6], GenerationConfig(max_new_tokens=10, **settings))
    assert ("stop" in {answer.finish for answer in answers}) == ("stop_strings" in settings)
    for prompt, answer in zip(engine._encode(prompts[:6]), answers, strict=True):
        ids = list(answer.ids)
        with torch.no_grad():
            if engine.model.is_encoder_decoder:
                begun = torch.tensor([[0, *ids[:-1]]])
                logits = reference(input_ids=torch.tensor([prompt]), decoder_input_ids=begun).logits[0]
            else:
                logits = reference(torch.tensor([[*prompt, *ids[:-1]]])).logits[0, len(prompt) - 1 :]
        expected = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].sum().item()
        assert answer.log_prob == pytest.approx(expected, abs=1e-3)


def test_the_probability_of_an_answer_is_that_of_the_line_shown(stories, shared):
    """By transformers: the tokens of the first line and the one that ends it, not what the model went on to write."""
    from transformers import LlamaForCausalLM

    question, context = "What did Tom see?", "Tom saw a big red ball in the park."
    (found,) = predict(stories, [View("q", question, context)], PromptLimits(400, 100, 64), progress=False)
    reference = LlamaForCausalLM.from_pretrained(shared / "checkpoints" / "stories260K").eval()
    prompt = [stories.tokenizer.bos_id, *stories.tokenizer.encode(qa_prompt(question, context, "decoder"))]
    with torch.no_grad():
        ids = reference.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0].tolist()
        log_probs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    text, total = "", 0.0
    for place in range(len(prompt), len(ids)):
        total += log_probs[place - 1, ids[place]].item()
        text = stories.tokenizer.decode(ids[len(prompt) : place + 1])
        if "\n" in text:
            break
    assert found.prediction == text.split("\n")[0].strip()
    assert found.log_prob == pytest.approx(total, abs=1e-3)
