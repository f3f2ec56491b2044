"""F1 over characters, by hand."""

import json

import pytest

from babl import cli
from babl.evaluation.characters import f1_characters


def asked(**golds):
    qas = [{"id": qid, "question": "?", "answers": [{"text": text} for text in texts]} for qid, texts in golds.items()]
    return {"version": "2.0", "data": [{"title": "t", "paragraphs": [{"context": "", "qas": qas}]}]}


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("北京市", ["北京"], 2 * 2 / (3 + 2)),
        ("上海", ["北京"], 0.0),
        ("京北", ["北京"], 1.0),  # a bag of characters, as the official F1 is a bag of words
        ("哈哈哈", ["哈哈"], 2 * 2 / (3 + 2)),
        ("The Cat!", ["cat"], 1.0),
        ("東京 タワー", ["東京タワー"], 1.0),
        ("北", ["南", "北京"], 2 * 1 / (1 + 2)),
        ("", [], 1.0),
        ("x", [], 0.0),
    ],
)
def test_the_best_gold_counts(prediction, golds, expected):
    assert f1_characters(asked(q=golds), {"q": prediction}) == pytest.approx(100 * expected)


def test_it_stands_beside_the_official_figures_which_stay_as_they_were(tmp_path, capsys):
    data, answers = tmp_path / "dev.json", tmp_path / "predictions.json"
    data.write_text(json.dumps(asked(a=["北京"], b=["巴黎"])))
    answers.write_text(json.dumps({"a": "北京市", "b": "巴黎"}))
    assert cli.main(["score", str(data), str(answers)]) == 0
    official = json.loads(capsys.readouterr().out)
    assert cli.main(["score", str(data), str(answers), "--f1-characters"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both.pop("f1_characters") == pytest.approx(100 * (0.8 + 1.0) / 2)
    assert both == official and official["f1"] == 50.0
