import json
import subprocess
import sys

import pytest

from babl.cli import main

ARTICLES = 6


def data_set(impossible=False):
    """Six articles of four questions with the answers w0 to w3; in version 2.0 the last of each has none."""
    context = "w0 w1 w2 w3"
    articles = []
    for i in range(ARTICLES):
        qas = [
            {"id": f"{i}-{j}", "question": f"Which {j}?", "answers": [{"text": f"w{j}", "answer_start": 3 * j}]}
            for j in range(4)
        ]
        if impossible:
            qas[3] |= {"answers": [], "is_impossible": True}
        articles.append({"title": f"T{i}", "paragraphs": [{"context": context, "qas": qas}]})
    return {"version": "v2.0" if impossible else "1.1", "data": articles}


def answers(right, wrong="nothing of the kind"):
    """Predictions that are right where `right(article, question)` says so."""
    return {f"{i}-{j}": f"w{j}" if right(i, j) else wrong for i in range(ARTICLES) for j in range(4)}


@pytest.fixture
def compare(tmp_path, capsys):
    """A function that writes the files, runs the verb, and returns exit code, stdout and stderr."""

    def run(data, a, b, *options):
        paths = []
        for name, value in (("data", data), ("a", a), ("b", b)):
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(json.dumps(value))
        code = main(["compare", *map(str, paths), *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_every_figure_of_a_small_comparison(compare, tmp_path):
    """A is right on the first question of each article; B on the second and third, and in T0 on the first alone."""
    a, b = answers(lambda i, j: j == 0), answers(lambda i, j: j in (1, 2) if i else j == 0)
    code, out, _ = compare(data_set(), a, b, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["difference"] == "B - A"
    assert (found["a"], found["b"]) == (str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert (found["questions"], found["articles"], found["version"]) == (24, 6, "1.1")
    exact = found["exact"]
    assert (exact["a"], exact["b"]) == pytest.approx((25, 100 * 11 / 24))
    assert exact["difference"] == pytest.approx(100 * 5 / 24)  # an article each of 0, and five of + 1 question in 4
    assert (exact["b_better"], exact["a_better"], exact["equal"]) == (10, 5, 9)
    spread = 25 * (5 / 36 / 6) ** 0.5 * (6 / 5) ** 0.5  # of article means 0, 25, 25, 25, 25, 25
    assert exact["standard_error"] == pytest.approx(spread)
    assert exact["interval"] == pytest.approx(
        [100 * 5 / 24 - 2.5706 * spread, 100 * 5 / 24 + 2.5706 * spread], rel=1e-4
    )
    assert exact["p_randomisation"] == pytest.approx(2 / 32, abs=0.005)  # all five of one sign, or of the other
    assert exact["p_mcnemar_naive"] == pytest.approx(0.3018, abs=1e-4)  # 10 against 5
    assert exact["minimal_detectable_effect"] > 2.8 * spread
    assert found["f1"]["difference"] == pytest.approx(exact["difference"])
    assert "p_mcnemar_naive" not in found["f1"]
    assert [shown["id"] for shown in found["b_better_examples"]] == ["1-1", "1-2", "2-1"], "three at most"
    assert found["a_better_examples"][0] == {
        "id": "1-0",
        "question": "Which 0?",
        "golds": ["w0"],
        "a": "w0",
        "b": "nothing of the kind",
    }


def test_the_table_says_which_way_and_which_p_is_naive(compare):
    a, b = answers(lambda i, j: j == 0), answers(lambda i, j: j in (1, 2))
    code, out, _ = compare(data_set(), a, b)
    lines = out.splitlines()
    assert code == 0 and "24 questions of 6 articles, SQuAD 1.1" in lines
    rows = {line[:27].strip(): line[27:].split() for line in lines if line}
    assert rows["A"][-2:] == ["25.00", "25.00"] and rows["B"][-2:] == ["50.00", "50.00"]
    assert rows["B - A"] == ["25.00", "25.00"]
    assert rows["p, McNemar (naive)"] == ["0.2379", "-"]
    assert rows["95 % interval, new articles"] == rows["SE, clustered by article"] == ["-", "-"]
    assert "-: all articles agree exactly, so nothing shows how far others would differ" in lines
    assert "intervals and p are about these two models; another seed may give others" in lines
    assert rows["questions B answers better"] == ["12", "12"] and rows["questions equal"] == ["6", "6"]
    assert "B right, A wrong:" in lines and "    gold 'w1', A 'nothing of the kind', B 'w1'" in lines


def test_the_other_way_round_is_the_same_with_the_other_sign(compare):
    a, b = answers(lambda i, j: j == 0), answers(lambda i, j: i + j > 3)
    one, other = (json.loads(compare(data_set(), *pair, "--json")[1]) for pair in ((a, b), (b, a)))
    for metric in ("exact", "f1"):
        assert one[metric]["difference"] == -other[metric]["difference"] != 0
        assert one[metric]["interval"] == pytest.approx([-x for x in reversed(other[metric]["interval"])])
        assert one[metric]["p_randomisation"] == other[metric]["p_randomisation"]
    assert one["a_better_examples"][0]["id"] == other["b_better_examples"][0]["id"]


def test_version_2_knows_questions_without_an_answer(compare):
    silent = answers(lambda i, j: j == 0) | {f"{i}-3": "" for i in range(ARTICLES)}
    code, out, _ = compare(data_set(impossible=True), answers(lambda i, j: j == 0), silent, "--json")
    found = json.loads(out)
    assert code == 0 and found["version"] == "2.0"
    assert (found["exact"]["a"], found["exact"]["b"]) == (25, 50)
    assert found["b_better_examples"][0]["golds"] == [] and found["b_better_examples"][0]["b"] == ""
    assert (
        "gold no answer, A 'nothing of the kind', B ''" in compare(data_set(True), answers(lambda i, j: 0), silent)[1]
    )


def test_a_file_compared_with_itself_differs_by_nothing(compare):
    same = answers(lambda i, j: (i + j) % 2)
    code, out, _ = compare(data_set(), same, same, "--json")
    exact = json.loads(out)["exact"]
    assert code == 0
    assert (exact["difference"], exact["interval"], exact["standard_error"]) == (0, None, None)
    assert exact["p_randomisation"] == exact["p_mcnemar_naive"] == 1


@pytest.mark.parametrize(("articles", "reason"), [(1, "1 article, and"), (4, "4 articles, and"), (5, None)])
def test_fewer_than_five_articles_have_no_interval(compare, articles, reason):
    data = data_set()
    data["data"] = data["data"][:articles]
    ids = [(i, j) for i in range(articles) for j in range(4)]
    a, b = {f"{i}-{j}": "w0" for i, j in ids}, {f"{i}-{j}": f"w{j if i else 0}" for i, j in ids}
    code, out, _ = compare(data, a, b, "--json")
    exact = json.loads(out)["exact"]
    figures = [exact[key] for key in ("interval", "standard_error", "minimal_detectable_effect")]
    assert code == 0 and 0 < exact["p_randomisation"] <= 1
    if reason is None:
        assert None not in figures and "no_interval" not in exact
        return
    assert figures == [None] * 3 and exact["no_interval"] == f"{reason} an interval needs 5"
    code, out, _ = compare(data, a, b)
    assert code == 0 and [line.split()[-2:] for line in out.splitlines() if "95 % interval" in line] == [["-", "-"]]
    assert out.count(f"-: {reason} an interval needs 5\n") == 1


def test_three_questions_that_all_differ_are_no_certainty(compare):
    data = data_set()
    data["data"] = data["data"][:3]
    for article in data["data"]:
        article["paragraphs"][0]["qas"] = article["paragraphs"][0]["qas"][:1]
    code, out, _ = compare(data, {f"{i}-0": "no" for i in range(3)}, {f"{i}-0": "w0" for i in range(3)})
    assert code == 0 and "100.00 to" not in out and "0.00 to" not in out
    rows = {line[:27].strip(): line[27:].split() for line in out.splitlines() if line}
    assert rows["B - A"] == ["100.00", "100.00"] and rows["detectable with power .8"] == ["-", "-"]
    assert float(rows["p, randomisation by article"][0]) == pytest.approx(0.25, abs=0.005)  # two of eight signs


def test_the_questions_that_both_have_are_compared_on_request(compare):
    a, b = answers(lambda i, j: j == 0), answers(lambda i, j: j in (0, 1 + (i > 2)))
    del a["0-0"], b["0-1"], b["5-3"]
    code, out, err = compare(data_set(), a, b)
    assert (code, out) == (2, "")
    assert "a.json: 1 of 24 questions of the data missing, first 0-0; --common compares the 21 that both" in err
    code, out, _ = compare(data_set(), a, b, "--common", "--json")
    found = json.loads(out)
    assert (code, found["questions"], found["left_out"], found["articles"]) == (0, 21, 3, 6)
    assert (found["exact"]["a"], found["exact"]["b"]) == pytest.approx((100 * 5 / 21, 100 * 10 / 21))
    assert (found["exact"]["b_better"], found["exact"]["a_better"]) == (5, 0)
    out = compare(data_set(), a, b, "--common")[1]
    assert "21 questions of 6 articles, SQuAD 1.1; 3 left out, which not both have" in out.splitlines()
    code, out, err = compare(data_set(), {"0-0": "w0"}, {"0-1": "w1"}, "--common")
    assert (code, out) == (2, "") and "have no question in common" in err


def test_rewritten_questions_are_scored_against_their_own_answers(compare, tmp_path):
    """B was asked the counterfactual questions, one of which could not be built."""
    rewritten = data_set()
    for article in rewritten["data"]:
        paragraph = article["paragraphs"][0]
        paragraph["context"] = paragraph["context"].replace("w", "v")
        for qa in paragraph["qas"]:
            qa["answers"][0]["text"] = qa["answers"][0]["text"].replace("w", "v")
    del rewritten["data"][0]["paragraphs"][0]["qas"][0]
    (tmp_path / "questions.json").write_text(json.dumps(rewritten))
    reads = {qid: text.replace("w", "v") for qid, text in answers(lambda i, j: j < 3).items() if qid != "0-0"}
    options = ("--data-b", str(tmp_path / "questions.json"), "--common", "--json")
    code, out, _ = compare(data_set(), answers(lambda i, j: j < 2), reads, *options)
    found = json.loads(out)
    assert (code, found["questions"], found["left_out"]) == (0, 23, 1)
    assert (found["exact"]["a"], found["exact"]["b"]) == pytest.approx((100 * 11 / 23, 100 * 17 / 23))
    shown = found["b_better_examples"][0]
    assert (shown["id"], shown["golds"], shown["golds_b"], shown["b"]) == ("0-2", ["w2"], ["v2"], "v2")
    assert (
        json.loads(compare(data_set(), answers(lambda i, j: True), reads, "--common", "--json")[1])["exact"]["b"] == 0
    )


def test_predictions_of_other_questions_are_refused(compare):
    whole = answers(lambda i, j: True)
    short = {qid: text for qid, text in whole.items() if qid not in ("2-1", "4-0")}
    for a, b, file, message in (
        (whole, short, "b", "2 of 24 questions of the data missing, first 2-1"),
        (short, whole, "a", "2 of 24 questions of the data missing, first 2-1"),
        (short, short, "a", "2 of 24 questions of the data missing, first 2-1"),
        (whole | {"9-9": "x", "9-8": "y"}, whole, "a", "2 of 26 ids are not in the data, first 9-9"),
        (whole, whole | {"1-1": 7}, "b", "prediction of question 1-1 is 7, expected a string"),
    ):
        code, out, err = compare(data_set(), a, b)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1 and f"{file}.json: {message}" in err


def test_the_command_on_real_questions(shared, tmp_path):
    """As a user runs it, against the official figures."""
    data, given = shared / "data/squad/dev-v1.1-xquad-en.json", shared / "data/golden/v1.1.predictions.json"
    tree = json.loads(data.read_text(encoding="utf-8"))
    ids = [qa["id"] for article in tree["data"] for part in article["paragraphs"] for qa in part["qas"]]
    predictions = json.loads(given.read_text(encoding="utf-8"))
    a, b = tmp_path / "empty.json", tmp_path / "given.json"
    a.write_text(json.dumps(dict.fromkeys(ids, "")))
    b.write_text(json.dumps({qid: predictions.get(qid, "") for qid in ids}))
    command = [sys.executable, "-m", "babl.cli", "compare", str(data), str(a)]
    result = subprocess.run([*command, str(b), "--json"], capture_output=True, text=True, check=True)
    exact = json.loads(result.stdout)["exact"]
    official = json.loads((shared / "data/golden/v1.1.expected.json").read_text())["exact_match"]
    assert (exact["a"], exact["b"], exact["difference"]) == pytest.approx((0, official, official))
    low, high = exact["interval"]
    assert low < official < high and 3.5 < (high - low) / exact["standard_error"] < 4.5
    refused = subprocess.run([*command, str(given)], capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "v1.1.predictions.json: 11 of 1190 questions of the data missing, first " in refused.stderr
