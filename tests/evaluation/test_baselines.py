import pytest

from babl.data.fictional import chance_exact, fictional_examples
from babl.data.kinds import answer_kind
from babl.data.squad import Answer, Example, load_squad, to_squad
from babl.errors import UserError
from babl.evaluation.baselines import baselines
from babl.evaluation.squad import score


def example(qid, question, answer=None, context=""):
    return Example(qid, "T", question, context, (Answer(answer, 0),) if answer else ())


TRAIN = [
    example("1", "When was the bridge of Lom built?", "1823"),
    example("2", "When did the mill burn down?", "1901"),
    example("3", "When was the tower finished?", "1901"),
    example("4", "Who painted the harbour?", "Zara Tomi"),
    example("5", "Who painted the chapel?", "Ana Belo"),
    example("6", "What floats on the lake?", "a raft"),
]
CONTEXT = "In 1745 the duke, Karl Amber, sold two horses. They ran until 1750, and no longer."


def guess(name, train, question, context=CONTEXT, seed=0):
    return baselines(train, [example("q", question, context=context)], seed)[name]["q"]


def test_the_names_and_that_every_question_is_answered():
    test = [example("a", "When?"), example("b", "Who?")]
    found = baselines(TRAIN, test, 0)
    assert list(found) == ["empty", "majority", "nearest question", "random span"]
    assert all(list(answers) == ["a", "b"] for answers in found.values())
    assert found["empty"] == {"a": "", "b": ""}
    assert found["random span"] == {"a": "", "b": ""}  # nothing to draw from


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("When did it end?", "1901"),
        ("Who came?", "Ana Belo"),  # one each: the first by alphabet
        ("Why is that?", "1901"),  # no such kind in training: the commonest of all
    ],
)
def test_majority_is_that_of_the_questions_kind(question, answer):
    assert guess("majority", TRAIN, question) == guess("majority", TRAIN[::-1], question) == answer


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("When was the great bridge at Lom built?", "1823"),
        ("WHO painted a chapel", "Ana Belo"),
        ("The lake?", "a raft"),
    ],
)
def test_the_nearest_question_lends_its_answer(question, answer):
    assert guess("nearest question", TRAIN, question) == answer


def test_of_equally_near_questions_the_first_lends_its_answer():
    twins = [example(str(i), "Who painted the chapel?", name) for i, name in enumerate(("Zed", "Amy", "Bob"))]
    assert guess("nearest question", TRAIN[:3] + twins, "Who painted the chapel?") == "Zed"


def test_nearness_is_computed_block_by_block_as_at_once():
    train, test = fictional_examples(0)
    test = (test * 3)[:300]  # more than two blocks
    test = [Example(f"{i}", e.title, e.question, e.context, e.answers) for i, e in enumerate(test)]
    together = baselines(train, test, 0)
    for i in (0, 127, 128, 255, 256, 299):
        alone = baselines(train, test[i : i + 1], 0)
        assert all(alone[name][str(i)] == together[name][str(i)] for name in together)


def test_a_random_span_is_of_the_kind_the_question_wants():
    when = {guess("random span", TRAIN, "When was it?", seed=seed) for seed in range(30)}
    assert when == {"1745", "1750"}
    who = {guess("random span", TRAIN, "Who was it?", seed=seed) for seed in range(60)}
    assert who == {"Karl Amber"}
    what = {guess("random span", TRAIN, "What was it?", seed=seed) for seed in range(200)}
    assert len(what) > 10
    assert {answer_kind(span) for span in what} == {"phrase"}
    assert all(span in CONTEXT and len(span.split()) <= 5 for span in what)


def test_without_a_span_of_that_kind_any_is_drawn():
    spans = {guess("random span", TRAIN, "When was it?", "no year here") for _ in range(3)}
    assert len(spans) == 1
    assert spans.pop() in "no year here"


def test_a_question_keeps_its_span_in_another_order_and_has_another_for_another_seed():
    train, test = fictional_examples(0)
    one, again, reverse = (baselines(train, t, 1) for t in (test, test, test[::-1]))
    assert one == again == reverse
    other = baselines(train, test, 2)
    assert {name for name in one if one[name] != other[name]} == {"random span"}


def test_unanswerable_training_questions_teach_to_answer_nothing():
    silent = [example(str(i), f"When did number {i} end?") for i in range(9)]
    assert guess("majority", TRAIN + silent, "When was it?") == ""
    assert guess("majority", TRAIN + silent, "Who was it?") == "Ana Belo"
    assert guess("nearest question", TRAIN + silent, "When did number 7 end?") == ""
    assert guess("random span", TRAIN + silent, "When was it?") in ("1745", "1750")
    assert guess("random span", silent, "When was it?")  # no kind to want: any span


def test_what_the_test_answers_are_changes_nothing():
    train, test = fictional_examples(0)
    blind = [Example(e.id, e.title, e.question, e.context, ()) for e in test]
    assert baselines(train, test, 0) == baselines(train, blind, 0)


def test_nothing_to_learn_from_is_an_error():
    with pytest.raises(UserError, match="baselines learn from training questions, found none"):
        baselines([], TRAIN, 0)


def test_no_baseline_beats_chance_where_training_cannot_help():
    train, test = fictional_examples(0)
    chance = chance_exact(e.answers[0].text for e in test)
    for name, answers in baselines(train, test, 0).items():
        assert score(to_squad(test), answers)["exact_match"] < chance + 5, name


def test_real_questions(shared):
    train = load_squad(shared / "data/squad/train-v1.1-slice.json")
    test = load_squad(shared / "data/squad/dev-v1.1-xquad-en.json")
    found = baselines(train, test, 0)
    exact = {name: score(to_squad(test), answers)["exact_match"] for name, answers in found.items()}
    assert exact["empty"] == 0
    assert 0 < exact["majority"] < exact["random span"] < 5
    assert all(found["random span"][e.id] and found["random span"][e.id] in e.context for e in test)
