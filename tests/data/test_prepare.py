"""What a run trains and validates on: nothing the model cannot read, and every question that is left out is told."""

import pytest

from babl.data.prepare import prepare_data
from babl.data.sets import DataConfig
from babl.data.squad import Answer, Example
from babl.errors import UserError
from babl.text import train_tokenizer

FILLING = " ".join(f"stone{i}" for i in range(60))


def example(qid, question="Who came?", answer="Ann", before=""):
    context = f"{before}{answer} came."
    return Example(qid, qid, question, context, (Answer(answer, len(before)),))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([FILLING, "Who came? Ann came. context question"] * 9, 500, tmp_path_factory.mktemp("t"))


def prepare(tokenizer, train, validation, style="decoder", context_length=None, **settings):
    cfg, said = DataConfig(**{"max_source_tokens": 64, "stride": 8} | settings), []
    window = tokenizer, cfg.max_source_tokens, cfg.stride, style
    return prepare_data(cfg, (train, validation), window, context_length, said.append), said


def test_questions_too_long_are_left_out_of_both_sets_and_told(tokenizer):
    long = example("long", question=FILLING * 2)
    found, said = prepare(tokenizer, [example("a"), long], [example("v"), long])
    assert [feature.id for feature in found.train] == ["a"] and [feature.id for feature in found.validation] == ["v"]
    assert [line.split(":")[0] for line in said] == ["data.train", "data.validation"]
    for line in said:
        assert "2 questions, 2 shown; 1 examples, " in line and "1 questions too long, first: " in line
        assert "max_source_tokens is 64, but question long takes" in line


@pytest.mark.parametrize("name", ["train", "validation"])
def test_questions_too_long_are_an_error_where_that_is_wished(tokenizer, name):
    sets = {"train": [example("a")], "validation": [example("v")]}
    sets[name].append(example("long", question=FILLING * 2))
    with pytest.raises(UserError) as refused:
        prepare(tokenizer, *sets.values(), overlong="error")
    assert str(refused.value).startswith(
        f'data.{name}: 1 of 2 questions are too long, and data.overlong is "error"; first: max_source_tokens is 64, '
        "but question long takes "
    )


def test_no_example_is_longer_than_the_models_context_and_answers_have_room(tokenizer):
    train = [example(f"q{i}", before=" ".join(FILLING.split()[:i]) + " ") for i in range(1, 60)]
    giant = example("giant", answer=FILLING)
    found, said = prepare(tokenizer, [*train, giant], [example("v")], context_length=72)
    assert found.train and max(len(f.source) + len(f.target) - 1 for f in found.train) <= 72
    assert {feature.id for feature in found.train} == {e.id for e in train}, "a window leaves room for its answer"
    assert said[0] == "prompts have at most 54 tokens, not 64: the answer needs room in a context of 72"
    assert found.window[1] == 54


def test_a_set_of_which_nothing_is_left_is_refused_with_its_counts(tokenizer):
    long = example("long", question=FILLING * 2)
    with pytest.raises(
        UserError, match=r"data.validation leaves no example: 1 questions, 1 shown; 0 examples, .*too long"
    ):
        prepare(tokenizer, [example("a")], [long])
    with pytest.raises(UserError, match=r"data.train leaves no example: 1 questions, 1 shown; 0 examples"):
        prepare(tokenizer, [long], [example("a")])


def test_contexts_are_measured_in_words_of_their_script(tokenizer):
    chinese = Example("z", "z", "谁？", "老人把钥匙埋在石阶下面。", (Answer("老人", 0),))
    found, _ = prepare(
        tokenizer, [example("a", before="One two three. "), chinese], [example("v")], max_source_tokens=512
    )
    sizes = dict(zip([feature.id for feature in found.train], found.words, strict=True))
    assert sizes["a"] == 5 and 5 <= sizes["z"] <= 11


def test_questions_that_an_arm_cannot_show_are_told_with_the_reason(tokenizer):
    bare = Example("bare", "bare", "Who came?", "", (Answer("Ann", None),))
    other = Example("other", "other", "Who came?", "Bob came.", (Answer("Ann", None),))
    found, said = prepare(tokenizer, [example("a"), bare, other], [example("v")])
    assert [feature.id for feature in found.train] == ["a"]
    assert said[0].startswith(
        "data.train: 3 questions, 1 shown, 1 not: the question has no context, 1 not: the context does not hold the "
        "answer; 1 examples, "
    )
    assert said[1].startswith("data.validation: 1 questions, 1 shown; 1 examples, ")
