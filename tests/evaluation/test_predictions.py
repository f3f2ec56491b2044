import json
from dataclasses import asdict, replace

import pytest
import torch

from babl.data.contexts import build_views
from babl.data.fictional import fictional_corpus
from babl.data.squad import parse_squad
from babl.errors import UserError
from babl.evaluation import predictions
from babl.evaluation.predictions import Prediction, PromptLimits, answer_key, predict, predict_into, read_predictions
from babl.evaluation.runner import evaluate
from babl.generation import Engine
from babl.models import save_pretrained
from babl.models.t5 import T5, T5Config
from babl.text import train_tokenizer

ASKING = PromptLimits(max_source_tokens=128, stride=16, max_new_tokens=4)


@pytest.fixture(scope="module")
def examples():
    return parse_squad(fictional_corpus(1, 2, unanswerable=0.2)[1], "fictional")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, examples):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([e.context for e in examples], 400, folder)
    model = T5(T5Config(d_model=16, d_kv=4, d_ff=16, num_heads=2, num_layers=1, vocab_size=tokenizer.vocab_size))
    model.init_weights(torch.Generator().manual_seed(0))
    save_pretrained(model, folder)
    return folder


@pytest.fixture
def engine(folder):
    return Engine.load(folder, "cpu")


def test_predictions_go_on_where_a_kill_has_left_them(tmp_path, monkeypatch, engine, folder, examples):
    monkeypatch.setattr(predictions, "CHUNK", 10)
    views, _ = build_views(examples, "gold")
    path, key = tmp_path / "a" / "gold.jsonl", answer_key(engine, folder, views, ASKING)
    whole = predict_into(path, engine, views, ASKING, key, progress=False)
    written = path.read_bytes()
    assert whole == predict(engine, views, ASKING, progress=False) == read_predictions(path)
    asked = []

    def counted(engine, views, limits, chunk=predictions._chunk):
        asked.extend(views)
        return chunk(engine, views, limits)

    monkeypatch.setattr(predictions, "_chunk", counted)
    for cut in (10, len(written) // 2, len(written) - 1, len(written)):
        path.write_bytes(written[:cut])
        asked.clear()
        assert predict_into(path, engine, views, ASKING, key, progress=False) == whole
        assert path.read_bytes() == written
        lines = max(0, written[:cut].count(b"\n") - 1)
        assert len(asked) == (0 if lines == len(views) else len(views) - lines // 10 * 10)


def test_the_key_names_everything_that_decides_an_answer(engine, folder, examples, tmp_path):
    views, _ = build_views(examples, "gold")
    keys = {
        answer_key(engine, folder, views, ASKING),
        answer_key(engine, folder, views[1:], ASKING),
        answer_key(engine, folder, views, PromptLimits(128, 16, 5)),
    }
    weights = folder / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    keys.add(answer_key(engine, folder, views, ASKING))
    weights.write_bytes(kept)
    assert len(keys) == 4
    path = tmp_path / "p.jsonl"
    predict_into(path, engine, views, ASKING, "one", progress=False)
    predict_into(path, engine, views[:3], ASKING, "two", progress=False)
    assert json.loads(path.read_text().splitlines()[0]) == {"key": "two"} and len(read_predictions(path)) == 3


def test_the_probability_of_no_answer_is_that_of_writing_so(engine, examples):
    views, _ = build_views(examples[:4], "gold")
    asked = predict(engine, views, PromptLimits(128, 16, 4, no_answer=True), progress=False)
    assert all(0 < p.no_answer < 1 for p in asked)
    assert [p.no_answer for p in predict(engine, views, ASKING, progress=False)] == [None] * 4


def test_an_evaluation_leaves_out_what_cannot_be_built_and_scores_new_golds(engine, examples):
    result = evaluate(engine, examples, "counterfactual", ASKING)
    assert result.metrics["not_built"] == len(examples) - result.metrics["total"] > 0
    one_article = [e for e in examples if e.title == examples[0].title]
    with pytest.raises(UserError, match="--context random can be built for none of"):
        evaluate(engine, one_article, "random", ASKING)


def test_an_answer_may_hold_any_character(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [Prediction(f"q{i}", f"one{end}two", -1.0, 2, True, 1) for i, end in enumerate("\u2028\x85\x1e\r")]
    with path.open("w", encoding="utf-8") as file:
        predictions._append(file, [{"key": "k"}, *map(asdict, rows)])
    assert read_predictions(path) == rows


def test_a_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("{}\n{}\n")
    with pytest.raises(UserError, match=r"p\.jsonl: not the predictions that were written"):
        read_predictions(path)


def test_a_question_too_long_to_be_asked_counts_as_answered_with_nothing(engine, examples):
    long = replace(examples[0], id="long", question="who " * 200)
    limits = replace(ASKING, no_answer=True)
    found = evaluate(engine, [*examples, long], "gold", limits)
    assert found.predictions["long"] == "" and found.metrics["overlong"] == 1
    assert found.metrics["total"] == len(examples) + 1 == len(found.predictions), "the official number of questions"
    alone = evaluate(engine, examples, "gold", limits)
    assert {qid: text for qid, text in found.predictions.items() if qid != "long"} == alone.predictions
    assert alone.metrics["overlong"] == 0
    right = alone.metrics["exact"] * len(examples)
    assert found.metrics["exact"] == pytest.approx(right / (len(examples) + 1)), "it is wrong, not left out"


def test_a_question_too_long_to_be_asked_is_refused_before_any_is_asked_where_that_is_wished(engine, examples):
    long = replace(examples[0], id="long", question="who " * 200)
    with pytest.raises(UserError) as refused:
        evaluate(engine, [*examples, long], "gold", ASKING, overlong="error")
    message = str(refused.value)
    assert message.startswith(f"1 of {len(examples) + 1} questions are too long to be asked, first: max_source_tokens")
    assert "is 128, but question long takes" in message and "\n" not in message
