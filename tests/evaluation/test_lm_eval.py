import importlib
import json
import sys

import pytest
import torch
import transformers

from babl.errors import UserError
from babl.generation import Engine
from babl.models import from_pretrained, save_pretrained
from babl.models.build import ModelConfig, build_model
from babl.text import load_tokenizer, train_tokenizer
from babl.text.prompts import continuation_ids

WORDS = "the small fox reads a long book about old rivers and the town where nobody asks who answers what"
SHAPES = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 6},
}
PAIRS = [
    ("the small fox", " reads a long book"),
    ("the small fox", " reads"),
    ("who answers ", "what"),  # the space moves to the continuation
    ("nobody as", "ks who answers"),  # the boundary lies inside a token
    ("", "the town"),
    ("about old rivers and the town where nobody asks", " who"),
    ("a", " b, c; d!"),
]


def test_without_the_harness_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "babl.evaluation.lm_eval", raising=False)
    with pytest.raises(UserError, match=r"lm-evaluation-harness is not installed .*; pip install lm-eval"):
        importlib.import_module("babl.evaluation.lm_eval")


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval)")
    folder = tmp_path_factory.mktemp(request.param)
    train_tokenizer([WORDS] * 4, 330, folder)
    shape = SHAPES[request.param] | ({"max_position_embeddings": 64} if request.param == "llama" else {})
    model, _ = build_model(ModelConfig(family=request.param, shape=shape), folder, 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():  # sharp enough that no two tokens are equally likely
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    save_pretrained(model, folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    from babl.evaluation.lm_eval import EngineLM

    return EngineLM(Engine(from_pretrained(folder), load_tokenizer(folder)), batch_size=4)


def ask(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, arguments, i) for i, arguments in enumerate(arguments)]


def by_transformers(reference, prompt, target):
    """Log-probability of the target ids, and whether they are the likeliest, by one pass of transformers' model."""
    with torch.no_grad():
        if reference.config.is_encoder_decoder:
            begun = torch.tensor([[reference.config.decoder_start_token_id, *target[:-1]]])
            logits = reference(input_ids=torch.tensor([prompt]), decoder_input_ids=begun).logits[0]
        else:
            logits = reference(input_ids=torch.tensor([[*prompt, *target[:-1]]])).logits[0, len(prompt) - 1 :]
    found = logits.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)].sum().item()
    return pytest.approx(found, abs=2e-4), logits.argmax(-1).tolist() == target


def test_probabilities_are_those_of_transformers(model, folder):
    seq2seq = model.backend == "seq2seq"
    family = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    reference = family.from_pretrained(folder).eval()
    found = model.loglikelihood(ask(*PAIRS), disable_tqdm=True)
    for (context, continuation), pair in zip(PAIRS, found, strict=True):
        if context:
            prompt, target = model._encode_pair(context, continuation)
        else:
            prompt, target = [model.eot_token_id], model.engine.tokenizer.encode(continuation)
        assert pair == by_transformers(reference, prompt, target), (context, continuation)


def test_the_boundary_is_where_the_whole_text_has_it(model):
    prompt, target = model._encode_pair("nobody as", "ks who answers")
    tokenizer = model.engine.tokenizer
    if model.backend == "seq2seq":
        assert (prompt, target) == (
            [*tokenizer.encode("nobody as"), model.eot_token_id],
            tokenizer.encode("ks who answers"),
        )
        return
    whole = tokenizer.encode("nobody asks who answers")
    assert (prompt, target) == (tokenizer.encode("nobody as"), whole[len(prompt) :])
    assert whole[: len(prompt)] != prompt  # "asks" is one token, and belongs to neither
    with pytest.raises(
        UserError, match=r"of context and continuation \('nobody as', 'ks'\), one has no token of its own"
    ):
        model.loglikelihood(ask(("nobody as", "ks")), disable_tqdm=True)


def test_a_question_is_as_likely_as_to_the_engine(model):
    engine = model.engine
    context, continuation = "the small fox", " reads a long book"
    ((log_prob, _),) = model.loglikelihood(ask((context, continuation)), disable_tqdm=True)
    (tokens,) = engine.score([context], [continuation])
    assert len(tokens) == len(continuation_ids([continuation], engine.tokenizer, engine.style)[0])
    assert log_prob == pytest.approx(sum(tokens[:-1]), abs=1e-4)  # the engine's last one is EOS


def test_what_greedy_choice_writes_is_called_greedy(model):
    prompt = model.tok_encode("who answers what")
    (answer,) = model.engine.answer([prompt])
    written = list(answer.ids[:6])
    other = [*written[:-1], written[-1] ^ 1]
    found = model._loglikelihood_tokens([(None, prompt, written), (None, prompt, other)], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] > found[1][0]


def test_batches_change_nothing(model):
    requests = ask(*PAIRS)
    together = model.loglikelihood(requests, disable_tqdm=True)
    alone = [model.loglikelihood([request], disable_tqdm=True)[0] for request in requests]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-4)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_logits_that_are_no_numbers_have_no_log_probability(model, monkeypatch, value):
    head = model.engine.model.head
    outside = torch.tensor([250])  # of the continuation; its logit alone is none
    monkeypatch.setattr(model.engine.model, "head", lambda states: head(states).index_fill(-1, outside, value))
    for ask_it in (model.loglikelihood, model.loglikelihood_rolling):
        arguments = PAIRS[0] if ask_it == model.loglikelihood else PAIRS[0][:1]
        with pytest.raises(FloatingPointError, match="the model: logits after 0 tokens of the continuation are not"):
            ask_it(ask(arguments), disable_tqdm=True)


def test_writing_is_the_engines_up_to_a_stop(model):
    contexts = ["the small fox", "who answers what and where nobody asks"]
    whole = model.engine.generate(contexts, max_new_tokens=20)
    stops = [next(c for c in text if c.strip()) for text in whole]
    requests = ask(
        (contexts[0], {"until": [stops[0]], "max_gen_toks": 20, "do_sample": False, "temperature": 0.7}),
        (contexts[1], {"until": stops[1], "max_gen_toks": 20}),
        (contexts[0], {"until": [], "max_gen_toks": 20}),
    )
    found = model.generate_until(requests, disable_tqdm=True)
    assert found == [whole[0].split(stops[0])[0], whole[1].split(stops[1])[0], whole[0]]
    drawn = [{"do_sample": True, "temperature": 1.5, "top_k": 9, "max_gen_toks": 8}, {"do_sample": True}]
    assert len(model.generate_until(ask(*((contexts[0], kwargs) for kwargs in drawn)), disable_tqdm=True)) == 2
    with pytest.raises(UserError, match="generation setting 'top_kk'; did you mean 'top_k'"):
        model.generate_until(ask((contexts[0], {"top_kk": 3})))


def test_a_whole_text_is_each_of_its_tokens_once(model):
    short, long = "the small fox reads", " ".join([WORDS] * 8)
    found = model.loglikelihood_rolling(ask((short,), (long,)), disable_tqdm=True)
    ((expected, _),) = model.loglikelihood(ask(("", short)), disable_tqdm=True)
    assert found[0] == pytest.approx(expected, abs=1e-4)
    context = model.engine.model.context_length
    ids = model.engine.tokenizer.encode(long)
    if context is None:
        windows = [([model.prefix_token_id], ids)]
    else:  # each after the first begins with the last token of the one before
        assert len(ids) > 2 * context
        windows = [([model.prefix_token_id], ids[:context])]
        at = context
        while at < len(ids):
            end = min(at + context, len(ids))
            windows.append((ids[end - context - 1 : at], ids[at:end]))
            at = end
    values = model._loglikelihood_tokens([(None, *window) for window in windows], disable_tqdm=True)
    assert found[1] == pytest.approx(sum(value for value, _ in values), rel=1e-4)
    assert model.loglikelihood_rolling(ask(("",)), disable_tqdm=True) == [0]


def test_what_the_model_has_no_room_for_is_an_error(model):
    long = " ".join([WORDS] * 6)
    if model.engine.model.context_length is None:
        assert model.loglikelihood(ask((long, " who")), disable_tqdm=True)[0][0] < 0
        return
    with pytest.raises(UserError, match=r"context and continuation take \d+ tokens, expected at most 64"):
        model.loglikelihood(ask((long, " who")), disable_tqdm=True)
    with pytest.raises(UserError, match="fewer than the model's context, 64"):
        model.generate_until(ask((long, {})), disable_tqdm=True)


def test_the_harness_runs_its_tasks_on_it(model, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [{"text": "the small", "choices": [" fox", " town"], "gold": i % 2} for i in range(6)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    files = {"data_files": {"test": str(tmp_path / "rows.json")}, "cache_dir": str(tmp_path)}
    data = {"dataset_path": "json", "dataset_kwargs": files}
    shared = data | {"test_split": "test", "doc_to_text": "{{text}}", "num_fewshot": 0}
    choose = shared | {"task": "choose", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
    write = shared | {"task": "write", "output_type": "generate_until", "doc_to_target": "fox"}
    write |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 5}, "metric_list": [{"metric": "exact_match"}]}
    tasks = [choose | {"doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}]}, write]
    results = lm_eval.simple_evaluate(
        model, tasks=tasks, task_manager=TaskManager(include_defaults=False), log_samples=False
    )
    assert results["results"]["choose"]["acc,none"] == 0.5
    assert results["results"]["write"]["exact_match,none"] in (0, 1)
