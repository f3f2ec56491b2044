from collections import Counter

import pytest

from babl.data.squad import load_squad, to_squad
from babl.evaluation.errors import ERROR_KINDS, error_kind
from babl.evaluation.squad import question_scores

CONTEXT = "Ada Lovelace met Charles Babbage in 1833. Babbage's engine, of the U.S. (1837-71), was never built."


@pytest.mark.parametrize(
    ("prediction", "kind"),
    [
        ("charles babbage", "right"),
        ("the Babbage", "boundary"),
        ("Mr Charles Babbage senior", "boundary"),
        ("Ada Lovelace", "wrong entity"),
        ("the ENGINE", "wrong entity"),
        ("U.S.", "wrong entity"),
        ("US", "wrong entity"),  # as normalised
        ("1837", "wrong entity"),  # a word of 1837-71, though its normal form is 183771
        ("71", "wrong entity"),
        ("gin", "not in context"),  # part of a word
        ("Lovelace Ada", "not in context"),
        ("€", "not in context"),
        ("", "empty"),
        ("The.", "empty"),
    ],
)
def test_kinds_of_answers_to_a_question_with_one(prediction, kind):
    assert error_kind(prediction, ["Charles Babbage"], CONTEXT, complete=True) == kind


def test_a_possessive_is_its_owner():
    assert error_kind("Babbage", ["Ada"], "It was Babbage's engine", complete=True) == "wrong entity"


def test_without_context_what_shares_nothing_is_just_wrong():
    assert error_kind("Ada Lovelace", ["Charles Babbage"], None, complete=True) == "wrong"
    assert error_kind("Babbage", ["Charles Babbage"], None, complete=True) == "boundary"
    assert error_kind("Ada Lovelace", ["Charles Babbage"], "", complete=True) == "not in context"


@pytest.mark.parametrize("prediction", ["", "Ada", "Charles", "Ada Lovelace met"])
def test_what_was_cut_off_is_truncated_unless_it_is_right(prediction):
    assert error_kind(prediction, ["Charles Babbage"], CONTEXT, complete=False) == "truncated"
    assert error_kind("Charles Babbage", ["Charles Babbage"], CONTEXT, complete=False) == "right"


@pytest.mark.parametrize(
    ("prediction", "complete", "kind"),
    [
        ("", True, "right"),
        ("the", True, "right"),
        ("Ada", True, "unanswerable"),
        ("Nobody", True, "unanswerable"),
        ("Ada", False, "unanswerable"),  # its end would not have made it right
    ],
)
def test_unanswerable_questions_want_nothing(prediction, complete, kind):
    assert error_kind(prediction, [], CONTEXT, complete) == kind


@pytest.mark.parametrize(
    ("golds", "prediction", "kind"),
    [
        (["the"], "a", "right"),
        (["the"], "", "right"),
        (["the", "cat"], "a", "empty"),
        (["the"], "cat", "not in context"),
    ],
)
def test_golds_of_articles_alone_count_as_in_version_2(golds, prediction, kind):
    assert error_kind(prediction, golds, CONTEXT, complete=True) == kind


def test_as_many_are_right_as_match_exactly_and_every_question_has_one_kind(shared):
    examples = load_squad(shared / "data/squad/dev-v2.0-slice.json")
    predictions = {}
    for i, example in enumerate(examples):
        words = example.context.split()
        mine = example.answers[0].text if example.answers else ""
        predictions[example.id] = (mine, f"{mine} {words[0]}", " ".join(words[i % 9 : i % 9 + 2]), "Xyzzy", "")[i % 5]
    counts = Counter(
        error_kind(predictions[e.id], [a.text for a in e.answers], e.context, complete=i % 7 > 0)
        for i, e in enumerate(examples)
    )
    exact = sum(s.exact for s in question_scores(to_squad(examples), predictions).values())
    assert counts["right"] == exact > 0
    assert set(counts) == set(ERROR_KINDS) - {"wrong"}
    assert counts.total() == len(examples)
