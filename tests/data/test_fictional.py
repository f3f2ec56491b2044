import collections
import re

import pytest

from babl.data.fictional import GRADES, chance_exact, fictional_corpus
from babl.data.squad import parse_squad


def sets(unanswerable=0.0):
    train, dev = fictional_corpus(60, 12, seed=3, unanswerable=unanswerable)
    return parse_squad(train, "train"), parse_squad(dev, "dev")  # verifies every answer against its context


def names(examples):
    invented = re.compile(r"\b(?:[BDFGKLMNPRSTVZ][aeiou])(?:[bdfgklmnprstvz][aeiou]){2}\b")
    return {name for e in examples for name in invented.findall(f"{e.title} {e.context} {e.question}")}


def test_no_title_and_no_name_of_dev_occurs_in_training():
    train, dev = sets()
    assert not {e.title for e in train} & {e.title for e in dev}
    assert len(names(dev)) > 100
    assert not (names(train) & names(dev)) - {"Sunday"}


def test_the_same_seed_writes_the_same_corpus():
    assert fictional_corpus(3, 1, seed=5) == fictional_corpus(3, 1, seed=5) != fictional_corpus(3, 1, seed=6)


def test_grades_are_what_they_say():
    train, _ = sets()
    assert {e.grade for e in train} == set(GRADES)
    by_context = collections.defaultdict(list)
    for e in train:
        by_context[e.context].append(e)
    for e in train:
        rivals = {other.answers[0].text for other in by_context[e.context] if other.grade == "entity"}
        if e.grade == "entity":
            assert len(rivals) == 2 and e.answers[0].text in rivals
        if e.grade == "name":
            assert e.answers[0].text not in e.question


def test_guessing_the_commonest_answer_does_as_well_as_the_chance_level_says():
    train, dev = sets()
    plain = [e for e in dev if e.grade != "name"]
    by_question_kind = collections.defaultdict(collections.Counter)
    kind = lambda e: re.sub(r"[A-Z][a-z]+", "", e.question)  # noqa: E731
    for e in train:
        by_question_kind[kind(e)][e.answers[0].text] += 1
    guessed = [by_question_kind[kind(e)].most_common(1)[0][0] == e.answers[0].text for e in plain]
    expected = chance_exact(e.answers[0].text for e in plain)
    assert 100 * sum(guessed) / len(plain) == pytest.approx(expected, abs=8)
    assert chance_exact(e.answers[0].text for e in dev if e.grade == "name") < 0.001


def test_a_share_of_questions_is_unanswerable_in_version_two():
    train, _ = sets(unanswerable=0.3)
    assert 0.15 < sum(e.impossible for e in train) / len(train) < 0.4
