import json

import pytest

from babl.data.contexts import build_views
from babl.errors import UserError
from babl.experiment.results import read_results
from babl.files import file_hash


def test_what_was_written_is_read_cell_by_cell(finished):
    results = read_results(finished.folder)
    assert [(c.arm, c.seed) for c in results.cells] == [(c["arm"], c["seed"]) for c in finished.cells]
    assert {c.state for c in results.cells} == {"scored"} and not results.strangers
    assert [e.id for e in results.test] == [e.id for e in finished.test]
    for cell in results.cells:
        scored = json.loads((finished.folder / "cells" / cell.id / "scored.json").read_text())
        for condition, outcome in cell.outcomes.items():
            assert outcome.exact.mean() == pytest.approx(scored[condition]["exact"])
            assert outcome.f1.mean() == pytest.approx(scored[condition]["f1"])
    assert list(results.done("tiny-t5", "gold", "none")) == [0, 1, 2]


def test_a_counterfactual_answer_is_right_where_it_is_the_new_one(finished):
    outcome = read_results(finished.folder).done("tiny-t5", "gold", "counterfactual")[0]
    views, _ = build_views(finished.test, "counterfactual", 0)
    for view, example, text, exact in zip(views, finished.test, outcome.predictions, outcome.exact, strict=True):
        assert exact == 100 * (text.lower() == view.golds[0].lower())
        assert view.golds[0] != example.answers[0].text


def test_a_cell_is_planned_then_trained_then_scored(experiment):
    first, second, third, fourth = experiment.cells[:4]
    experiment.train(second)
    experiment.finish(third)
    experiment.finish(fourth)
    experiment.train(fourth, failed="final loss 9.1 above 2.0")
    states = {c.id: c.state for c in read_results(experiment.folder).cells}
    expected = {first["id"]: "planned", second["id"]: "trained", third["id"]: "scored", fourth["id"]: "failed"}
    assert {key: states[key] for key in expected} == expected


def test_no_cell_needs_to_be_there(experiment):
    assert {c.state for c in read_results(experiment.folder).cells} == {"planned"}


def changed(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("plan.json", '"margin": 1.0', '"margin": 9.0', r"plan\.json: not what was frozen, its hash is"),
        ("data/test.json", "title", "Title", "test.json: its hash is .*, but the plan says"),
        ("data/train.json", "context", "Context", "train.json: its hash is .*, but the plan says"),
        ("data/overlap.json", "1", "2", "overlap.json: its hash is .*, but the plan says"),
        ("data/classes.json", "none", "answer", "classes.json: its hash is .*, but the plan says"),
        ("cells/gold-1/predictions/gold.jsonl", "-0", "-1", "gold.jsonl: its hash is .*, but scored.json says"),
        (
            "cells/gold-1/scored.json",
            '"exact": ',
            '"exact": 1',
            r"gold-1/predictions/.*: its exact is .*, but scored.json",
        ),
    ],
)
def test_a_changed_byte_is_refused(finished, name, old, new, message):
    changed(finished.folder / name, old, new)
    with pytest.raises(UserError, match=message):
        read_results(finished.folder)


def test_a_missing_file_is_named(finished):
    (finished.folder / "cells/none-0/predictions/gold.jsonl").unlink()
    with pytest.raises(UserError, match=r"gold\.jsonl: no such file, though scored.json names it"):
        read_results(finished.folder)
    with pytest.raises(UserError, match="cells: no experiment is there"):
        read_results(finished.folder / "cells")


def test_a_lost_question_is_not_a_wrong_one(finished):
    cell = finished.folder / "cells/gold-0"
    path = cell / "predictions/gold.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    scored = json.loads((cell / "scored.json").read_text())
    scored["gold"]["predictions"] = file_hash(path)
    (cell / "scored.json").write_text(json.dumps(scored))
    with pytest.raises(
        UserError, match=f"gold.jsonl: 1 of {len(finished.test)} questions have no answer, first {finished.test[-1].id}"
    ):
        read_results(finished.folder)
