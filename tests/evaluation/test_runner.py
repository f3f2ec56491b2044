import json

import pytest
from scipy import stats

from babl.data.contexts import View
from babl.data.fictional import fictional_corpus
from babl.data.squad import load_squad, parse_squad
from babl.evaluation.predictions import Prediction
from babl.evaluation.runner import Evaluation, asked, attainable_exact, summarize
from babl.evaluation.squad import score


def data_set(right):
    """Article i has a question for each of `right[i]`; and predictions, right where it says so."""
    data, predictions = [], []
    for i, of in enumerate(right):
        qas = [
            {"id": f"{i}-{j}", "question": "Which?", "answers": [{"text": "x", "answer_start": 0}]}
            for j in range(len(of))
        ]
        data.append({"title": f"T{i}", "paragraphs": [{"context": "x", "qas": qas}]})
        predictions += [Prediction(f"{i}-{j}", "x" if yes else "y", -1.0, 2, True, 1) for j, yes in enumerate(of)]
    return {"version": "1.1", "data": data}, predictions


def test_the_interval_of_single_questions_is_nearly_wilsons_and_short_to_write():
    right = [[i < 60] for i in range(200)]
    metrics = summarize(*data_set(right))
    low, high = metrics["exact_interval"]
    theirs = stats.binomtest(60, 200).proportion_ci(method="wilson")
    assert (low / 100, high / 100) == pytest.approx(theirs, abs=0.002)
    assert len(str(low)) <= 5 and len(str(high)) <= 5 and "no_interval" not in metrics


@pytest.mark.parametrize(
    ("right", "reason"),
    [
        ([[True] * 12 + [False] * 11], "1 article, and an interval needs 5"),
        ([[True, False]] * 4, "4 articles, and an interval needs 5"),
        ([[False, False]] * 30, "all articles agree exactly, so nothing shows how far others would differ"),
        ([[False]] * 28 + [[True]] * 2, "2 right of 30 answers, and an interval needs 5"),
    ],
)
def test_an_interval_that_would_not_hold_is_not_given_and_the_reason_is(right, reason):
    metrics = summarize(*data_set(right))
    assert metrics["exact_interval"] is None and metrics["no_interval"] == reason


class Upper:
    """A tokenizer that knows no lower case, so that "ß" comes back as "SS"."""

    def encode(self, text):
        return list(text.upper())

    def decode(self, ids):
        return "".join(ids)


def test_attainable_is_what_can_be_written_of_the_questions_asked():
    golds = [("York",), ("Weißer", "Weiser"), ("Weiß",), ("one\ntwo",), ()]
    views = [View(str(i), "?", None, of) for i, of in enumerate(golds)]
    assert attainable_exact(Upper(), views) == 60  # the third is spelt otherwise, the fourth ends at its first line
    assert attainable_exact(Upper(), views[:3]) == 66.67


def test_the_questions_that_were_asked_are_stored_and_score_the_predictions(tmp_path):
    """Of three questions the arm rewrites one, shows another as it is and cannot be built for the last."""
    examples = parse_squad(fictional_corpus(1, 2)[1], "fictional")[:3]
    as_it_is, rewritten, _ = examples
    context = "Nobody knows what Zanzibar has to do with it."
    views = [
        View(as_it_is.id, as_it_is.question, as_it_is.context, tuple(a.text for a in as_it_is.answers), 0),
        View(rewritten.id, rewritten.question, context, ("Zanzibar",), context.index("Zanzibar")),
    ]
    predictions = {as_it_is.id: as_it_is.answers[0].text, rewritten.id: "zanzibar"}
    Evaluation(predictions, {}, asked(examples, views)).save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "predictions.json",
        "metrics.json",
        "questions.json",
    }
    again = load_squad(tmp_path / "out" / "questions.json")  # whose answers stand where they are said to
    assert [(e.id, e.context) for e in again] == [(as_it_is.id, as_it_is.context), (rewritten.id, context)]
    stored = json.loads((tmp_path / "out" / "questions.json").read_text())
    assert score(stored, predictions)["exact_match"] == 100
