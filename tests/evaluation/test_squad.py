import json
import math

import pytest

from babl.errors import UserError
from babl.evaluation.squad import question_scores, read_by_id, score
from babl.text.normalize import normalize_answer


def squad(questions, version="2.0"):
    """A data set of (id, golds) pairs."""
    qas = [
        {"id": qid, "question": "?", "answers": [{"text": gold, "answer_start": 0} for gold in golds]}
        for qid, golds in questions
    ]
    return {"version": version, "data": [{"title": "T", "paragraphs": [{"context": "c", "qas": qas}]}]}


def one(golds, prediction, version):
    result = question_scores(squad([("q", golds)]), {"q": prediction}, version)["q"]
    return result.exact, result.f1


def load(shared, name):
    return json.loads((shared / "data" / name).read_text(encoding="utf-8"))


def test_reproduces_the_official_v1_figures(shared):
    data, predictions = load(shared, "squad/dev-v1.1-xquad-en.json"), load(shared, "golden/v1.1.predictions.json")
    result = score(data, predictions, missing="zero")  # the official script scores what is missing 0
    assert result.pop("missing") == 11
    assert result == pytest.approx(load(shared, "golden/v1.1.expected.json"), abs=1e-9)


def test_reproduces_the_official_v2_figures(shared):
    data = load(shared, "squad/dev-v2.0-slice.json")
    predictions, na_prob = load(shared, "golden/v2.0.predictions.json"), load(shared, "golden/v2.0.na_prob.json")
    expected = load(shared, "golden/v2.0.expected.json")
    assert score(data, predictions) == pytest.approx(expected["no_threshold"], abs=1e-9)
    result = score(data, predictions, na_prob, 0.6)
    official = {key: value for key, value in result.items() if not key.startswith("oracle_best")}
    assert official == pytest.approx(expected["threshold_0.6"], abs=1e-9)
    assert official.keys() == expected["threshold_0.6"].keys()


def test_reproduces_every_metric_vector(shared):
    vectors = load(shared, "golden/metric_vectors.json")
    for case in vectors["normalize"]:
        assert normalize_answer(case["input"]) == case["normalized"], case
    for case in vectors["scores"]:
        for version, exact in (("1.1", "exact_match"), ("2.0", "exact")):
            want, data = case[f"v{version}"], squad([("q", case["golds"])])
            if isinstance(want, str):  # the official script fails, too
                assert want.startswith("error")
                with pytest.raises(UserError, match="question q has no answer"):
                    question_scores(data, {"q": case["prediction"]}, version)
                continue
            got = question_scores(data, {"q": case["prediction"]}, version)["q"]
            assert (got.exact, got.f1) == pytest.approx((want[exact], want["f1"]), abs=1e-12), case
            assert got.has_answer == want.get("has_answer", bool(case["golds"]))
    for case in vectors["thresholds"]:
        data = squad([(q["id"], q["golds"]) for q in case["questions"]])
        result = score(data, case["predictions"], case["na_prob"], version="2.0")
        assert {key: result[key] for key in case["expected"]} == pytest.approx(case["expected"], abs=1e-9), case["name"]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat!", "cat"),
        ("well-known", "wellknown"),  # punctuation is deleted, not replaced
        ("the-end", "theend"),  # articles go after punctuation
        ("_the_", ""),
        ("1,000", "1000"),
        ("£5", "£5"),  # ASCII punctuation only
        ("New\u00a0York", "new york"),
        ("New\u200bYork", "new\u200byork"),
        ("İstanbul", "i\u0307stanbul"),
        ("½", "½"),
    ],
)
def test_normalisation_follows_the_official_order(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("golds", "prediction", "v1", "v2"),
    [
        (["red car", "big red car here"], "big red car", (0, 6 / 7), (0, 6 / 7)),
        (["new york"], "new new york", (0, 0.8), (0, 0.8)),  # tokens count as often as they stand
        (["the"], "the", (1, 0), (1, 1)),
        (["the"], "cat", (0, 0), (0, 0)),
        (["the", "cat"], "a", (1, 0), (0, 0)),  # version 2.0 drops the gold that normalises to nothing
    ],
)
def test_scores_where_the_versions_part(golds, prediction, v1, v2):
    assert one(golds, prediction, "1.1") == pytest.approx(v1)
    assert one(golds, prediction, "2.0") == pytest.approx(v2)


@pytest.mark.parametrize(("prediction", "expected"), [("", 1), ("The", 1), ("no answer", 0), ("N/A", 0)])
def test_an_unanswerable_question_wants_an_empty_answer(prediction, expected):
    assert one([], prediction, "2.0") == (expected, expected)


def test_a_gold_of_articles_alone_still_counts_as_answerable():
    assert score(squad([("q", ["the"])]), {"q": ""})["HasAns_exact"] == 100.0


def test_the_dict_of_lists_form_knows_which_questions_have_answers():
    data = squad([("a", ["x"]), ("b", [])])
    for qa in data["data"][0]["paragraphs"][0]["qas"]:
        qa["answers"] = {"text": [a["text"] for a in qa["answers"]], "answer_start": []}
    result = score(data, {"a": "x", "b": ""})
    assert (result["HasAns_total"], result["NoAns_total"], result["exact"]) == (1, 1, 100.0)


def test_abstaining_needs_more_than_the_threshold():
    data, predictions = squad([("a", ["x"]), ("b", [])]), {"a": "x", "b": "y"}
    assert score(data, predictions, {"a": 1.0, "b": 1.0}, 1.0)["exact"] == 50.0
    assert score(data, predictions, {"a": 0.4, "b": 0.6}, 0.5)["exact"] == 100.0


def test_no_best_threshold_without_probabilities():
    assert not [key for key in score(squad([("a", ["x"])]), {"a": "x"}) if key.startswith("best")]


def test_missing_predictions_are_an_error_unless_scored_zero_aloud():
    data = squad([("a", ["x"]), ("b", ["y"])], "1.1")
    with pytest.raises(UserError, match="1 of 2 predictions missing, first b; --missing zero"):
        score(data, {"a": "x", "other": "ignored"})
    assert score(data, {"a": "x"}, missing="zero") == {"exact_match": 50.0, "f1": 50.0, "total": 2, "missing": 1}


@pytest.mark.parametrize(
    ("data", "predictions", "na_prob", "message"),
    [
        (squad([("a", ["x"])]), {"a": None}, None, "prediction of question a is None, expected a string"),
        (squad([("a", ["x"]), ("a", ["x"])]), {"a": "x"}, None, "question id a stands twice"),
        (squad([("a", ["x"])]), {"a": "x"}, {}, "no-answer probability of question a is None"),
        (squad([("a", ["x"])]), {"a": "x"}, {"a": float("nan")}, "no-answer probability of question a is nan"),
        (squad([("a", ["x"])], "1.1"), {"a": "x"}, {"a": 0.5}, r"\(--na-prob\) are for SQuAD 2.0, but the data is of"),
        (squad([]), {}, None, "has no question"),
    ],
)
def test_wrong_input_is_named(data, predictions, na_prob, message):
    with pytest.raises(UserError, match=message):
        score(data, predictions, na_prob)


def test_a_threshold_that_is_no_number_is_refused():
    with pytest.raises(UserError, match=r"\(--na-threshold\) is nan, expected a number"):
        score(squad([("a", ["x"])]), {"a": "x"}, {"a": 0.5}, math.nan)


def test_ids_may_be_integers_and_contexts_absent():
    data = {"version": "1.1", "data": [{"paragraphs": [{"qas": [{"id": 7, "answers": [{"text": "x"}]}]}]}]}
    assert score(data, {"7": "X."}) == {"exact_match": 100.0, "f1": 100.0, "total": 1}


def test_predictions_may_begin_with_a_bom_and_hold_a_lone_surrogate(tmp_path):
    path = tmp_path / "p.json"
    path.write_bytes(b"\xef\xbb\xbf" + rb'{"a": "x\ud83d", "\udc00": NaN}')
    found = read_by_id(path)
    assert found["a"] == "x\ufffd" and "\ufffd" in found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"id": "a"}]', r'p\.json: expected an object \{"question id": answer\}, found list'),
        (b'{"a": ', r"p\.json: malformed JSON at line 1 column 7"),
        (b"[" * 100_000, r"p\.json: malformed JSON"),
        (b"\xff\xfe{", r"p\.json: cannot be read"),
    ],
)
def test_a_file_that_is_no_predictions_is_named(tmp_path, content, message):
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_by_id(tmp_path / "p.json")
