import re
from collections import Counter

import pytest

from babl.data.contexts import FILLER, TEST_ARMS, TRAIN_ARMS, build_views, holds
from babl.data.fictional import fictional_corpus
from babl.data.kinds import answer_kind
from babl.data.squad import Answer, Example, load_squad, parse_squad
from babl.text.segment import sentences

CHINESE = re.compile("[\u2e80-\u9fff]")  # has words, but no spaces between them
ARMS = tuple(dict.fromkeys((*TRAIN_ARMS, *TEST_ARMS)))


@pytest.fixture(scope="module")
def examples():
    return parse_squad(fictional_corpus(1, 12, seed=3)[1], "fictional")


@pytest.fixture(scope="module")
def real(shared):
    return load_squad(shared / "data/squad/dev-v1.1-xquad-en.json")


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_a_function_of_the_seed_and_the_question(examples, arm):
    views, _ = build_views(examples, arm, seed=5)
    assert (views, {}) == (build_views(examples, arm, seed=5)[0], {})
    again = {view.id: view for view in build_views(examples[::-1], arm, seed=5)[0]}
    assert all(again[view.id] == view for view in views), "whatever the order of the file"
    drawn = arm in ("random", "same-article", "gold+distractors", "mixture", "counterfactual", "shuffled")
    assert (build_views(examples, arm, seed=6)[0] != views) == drawn


@pytest.mark.parametrize("arm", ARMS)
def test_every_real_question_is_built_or_has_a_reason(real, arm):
    views, missing = build_views(real, arm)
    assert sorted([view.id for view in views] + list(missing)) == sorted(e.id for e in real)
    assert len(views) > 0.95 * len(real) and all(missing.values())
    assert [v.id for v in views] == [e.id for e in real if e.id not in missing], "in the order of the file"
    for view in views:
        assert view.at is None or view.context[view.at :].startswith(view.golds[0])


def by_id(examples, arm):
    views, _ = build_views(examples, arm)
    originals = {e.id: e for e in examples}
    return [(view, originals[view.id]) for view in views]


def golds(example):
    return [answer.text for answer in example.answers]


def test_none_blank_and_gold_are_what_they_say(real):
    for view, example in by_id(real, "none"):
        assert (view.question, view.context, view.at) == (example.question, None, None)
    for view, example in by_id(real, "blank"):
        assert set(view.context.split()) <= set(FILLER.split())
        assert len(view.context.split()) == len(example.context.split()) or CHINESE.search(example.context)
    for view, example in by_id(real, "gold"):
        assert (view.context, list(view.golds), view.at) == (example.context, golds(example), example.answers[0].start)


def test_a_random_context_is_of_another_article_and_of_like_length(real):
    home = {}
    for example in real:
        home.setdefault(example.context, example.title)
    cut = 0
    for view, example in by_id(real, "random"):
        (source,) = {c for c in home if c.startswith(view.context)}
        assert home[source] != example.title
        if not CHINESE.search(view.context + example.context):
            assert 0.9 <= len(view.context.split()) / len(example.context.split()) <= 1.1
        cut += source != view.context
    assert 0 < cut < 0.1 * len(real), "long ones are cut only where none is of like length"


def test_contexts_without_the_answer_do_not_hold_it(real):
    contexts = {(e.title, e.context) for e in real}
    for view, example in by_id(real, "same-article"):
        assert (example.title, view.context) in contexts and view.context != example.context
        assert not holds(view.context, golds(example))
    for view, example in by_id(real, "answer-removed"):
        assert not holds(view.context, golds(example)) and view.context
        kept = [view.context[a:b] for a, b in sentences(view.context)]
        assert all(sentence in example.context for sentence in kept)


def test_distractors_are_of_the_same_article_and_leave_one_place_for_the_answer(real):
    first = Counter()
    for view, example in by_id(real, "gold+distractors"):
        rest = view.context.replace(example.context, "", 1)
        assert example.context in view.context and not holds(rest, golds(example))
        first[view.context.index(example.context) == 0] += 1
    assert 0.25 < first[True] / first.total() < 0.42, "the order is uniform"


def test_the_mixture_shows_half_of_the_contexts(real):
    shown = [view.context is not None for view, _ in by_id(real, "mixture")]
    assert 0.45 < sum(shown) / len(shown) < 0.55


def test_without_the_question_only_the_context_is_left(real):
    for view, example in by_id(real, "context-only"):
        assert (view.question, view.context, list(view.golds)) == ("", example.context, golds(example))


def test_a_counterfactual_context_answers_with_another_of_the_same_kind(real, examples):
    for view, example in by_id(real, "counterfactual"):
        (new,) = view.golds
        assert not holds(view.context, golds(example)) and not holds(example.context, [new])
        assert answer_kind(new) == answer_kind(example.answers[0].text)
    months = {"January", "February", "March", "April", "May", "June", "July", "August", "September", "October"}
    changed = [v for v, e in by_id(examples, "counterfactual") if e.answers[0].text in months]
    assert changed and all(view.golds[0] in months for view in changed)


def test_shuffled_sentences_are_the_same_sentences(real):
    for view, example in by_id(real, "shuffled"):
        assert view.context != example.context
        assert Counter(view.context.split()) == Counter(example.context.split())


def test_what_cannot_be_built_says_why():
    def example(qid, context, answer):
        return Example(qid, "T", "What?", context, (Answer(answer, context.index(answer)),))

    examples = [
        example("one", "Only Rome is here.", "Rome"),
        example("the", "It is the one. It stands.", "the"),
        example("across", "He met Dr No. Yes is here. All left.", "No. Yes"),
    ]
    reasons = {arm: build_views(examples, arm)[1] for arm in ARMS}
    assert reasons["answer-removed"] == {
        "one": "every sentence holds the answer",
        "the": "there is no answer to remove",
    }
    assert reasons["shuffled"] == {
        "one": "the context is a single sentence",
        "across": "the answer stands across sentences",
    }
    assert set(reasons["random"].values()) == {"no paragraph of another article is long enough"}
    assert reasons["gold+distractors"] == {}
    assert set(build_views(examples[:2], "gold+distractors")[1].values()) == {
        "the article has fewer than 2 other paragraphs without the answer"
    }
    assert set(build_views(examples[:1], "same-article")[1].values()) == {
        "no other paragraph of the article is without the answer"
    }
    assert set(reasons["counterfactual"].values()) == {
        "no similar question has another answer of the same kind",
        "there is no answer to replace",
    }


def test_an_unanswerable_question_keeps_its_context():
    examples = [Example("q", "T", "What?", "One sentence. Another one.", ())]
    (view,), _ = build_views(examples, "gold")
    assert (view.golds, view.at) == ((), None)
    assert build_views(examples, "answer-removed")[1] == {"q": "there is no answer to remove"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two.", ["One.", "Two."]),
        ("Dr. Watson met J. R. Smith. They left!", ["Dr. Watson met J. R. Smith.", "They left!"]),
        ('He said "no." Then he left.', ['He said "no."', "Then he left."]),
        ("It cost 3.5 million. 1999 came.", ["It cost 3.5 million.", "1999 came."]),
        ("no end", ["no end"]),
    ],
)
def test_sentences_end_at_punctuation_before_a_capital(text, expected):
    assert [text[start:end] for start, end in sentences(text)] == expected


def test_the_contexts_own_form_of_an_answer_is_removed_and_replaced_and_trained_on():
    own = "Ko\u0308ln"  # the gold is written with one code point less
    other = f"They came from {own} in spring. The road was long."
    home = f"He lives in {own}. She lives in Bonn. All like {own} best."
    golds = (Answer("Köln", home.index(own), home.index(own) + len(own)),)
    examples = [
        Example("q", "T", "Where does he live?", home, golds),
        Example("r", "T", "What was long?", other, (Answer("road", other.index("road")),)),
        Example("s", "U", "Where does Ida live?", "Ida lives in Trier.", (Answer("Trier", 13),)),
    ]
    views = {
        arm: {v.id: v for v in build_views(examples, arm)[0]}
        for arm in ("none", "gold", "answer-removed", "counterfactual")
    }
    assert views["none"]["q"].target == views["gold"]["q"].target == own and views["none"]["q"].golds == ("Köln",)
    assert views["gold"]["q"].at == home.index(own)
    assert views["answer-removed"]["q"].context == "She lives in Bonn."
    assert own not in views["counterfactual"]["q"].context
    assert "q" not in {v.id for v in build_views(examples, "same-article")[0]}  # the other paragraph has it, too


def test_an_answer_that_the_context_does_not_hold_is_asked_and_not_trained_on():
    examples = [
        Example("a", "T", "Why?", "It rained. It was cold.", (Answer("bad weather", None),)),
        Example("b", "T", "What fell?", "It rained. It was cold.", (Answer("bad weather", None), Answer("rain", 3))),
        Example("c", "T", "Who?", "", (Answer("Ada", None),)),
    ]
    trained = {"none": "abc", "gold": "b", "mixture": "b", "blank": "ab", "shuffled": "b"}
    asked = trained | {"gold": "ab", "mixture": "ab"}
    for arm in trained:
        assert "".join(view.id for view in build_views(examples, arm, spans=True)[0]) == trained[arm], arm
        assert "".join(view.id for view in build_views(examples, arm)[0]) == asked[arm], arm
    reasons = build_views(examples, "gold", spans=True)[1]
    assert reasons == {"a": "the context does not hold the answer", "c": "the question has no context"}
