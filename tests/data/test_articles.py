"""No leak goes unseen: the same data under another title, case, spelling of spaces or Unicode form is the same data."""

import hashlib
import unicodedata

import pytest

from babl.data.articles import articles, disjoint, shared, split_by_article
from babl.data.squad import Answer, Example
from babl.errors import UserError

TOWNS = ["Ådal", "Bjørnø", "Crête", "Dún_Mór", "Ēvele"]  # five articles of three paragraphs, four questions each


def questions(towns=TOWNS):
    found = []
    for i, town in enumerate(towns):
        for j in range(3):
            name = town.replace("_", " ")
            mill = f"The mill of {name} has {3 + i + 5 * j} wheels by the river since {1700 + 9 * i + j}."
            keeper = f"Each autumn its keeper, José Nuñez the {j + 1}th, weighs the corn of field {i} with {j} stones."
            context = f"{mill} {keeper}"
            answer = Answer("The mill", 0)
            found += [
                Example(f"{town}{j}{k}", town, f"What about the {word} of {town} {j}?", context, (answer,))
                for k, word in enumerate(("wheels", "river", "keeper", "corn"))
            ]
    return found


def changed(example, **fields):
    values = {name: getattr(example, name) for name in ("id", "title", "question", "context", "answers")} | fields
    return Example(**values | {"id": f"other-{example.id}"})


def respelled(spell):
    return lambda e: changed(e, title=spell(e.title), question=spell(e.question), context=spell(e.context))


DISGUISES = {
    "the file itself": lambda e: e,
    "other titles": lambda e: changed(e, title=f"Chapter {TOWNS.index(e.title)}"),
    "a title for each context": lambda e: changed(e, title=e.id[-2]),
    "no titles": lambda e: changed(e, title=""),
    "one title": lambda e: changed(e, title="reading comprehension"),
    "upper case": respelled(str.upper),
    "lower case": respelled(str.lower),
    "decomposed": respelled(lambda text: unicodedata.normalize("NFD", text)),
    "full-width digits": respelled(lambda text: text.translate({ord(d): ord(d) + 0xFEE0 for d in "0123456789"})),
    "underscores": respelled(lambda text: text.replace(" ", "_")),
    "other spaces": respelled(lambda text: f" {text} ".replace(" ", " \u00a0\n")),
    "all at once": lambda e: changed(
        e,
        title="x",
        question=unicodedata.normalize("NFD", e.question.upper()).replace(" ", "  "),
        context=unicodedata.normalize("NFD", e.context.lower()).replace(" ", "_"),
    ),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_equal_data_is_refused_with_its_count_whatever_it_looks_like(disguise):
    train = questions()
    test = [DISGUISES[disguise](example) for example in train]
    assert len(test) == 60
    for one, other in ((train, test), (test, train)):
        with pytest.raises(UserError) as refused:
            disjoint(one, other, "data.validation", ("train.json", "dev.json"))
        message = str(refused.value)
        assert message.startswith("data.validation: dev.json shares ") and "\n" not in message
        assert "(15 of 15 contexts and 60 of 60 questions are equal, 0 more contexts nearly)" in message


def test_a_single_equal_context_or_title_among_others_is_refused():
    train, test = questions(TOWNS[:3]), questions(TOWNS[3:])
    assert shared(train, test).articles == []
    stray = changed(train[5], title="Elsewhere", question="Who?")
    with pytest.raises(UserError, match=r"shares 1 article with a, first 'Bj.*|first .*1 of 7 contexts and 0 of 25"):
        disjoint(train, [*test, stray], "data.validation", ("a", "b"))
    stray = changed(test[0], title="dún mór" if test[0].title != "Dún_Mór" else "CRÊTE", context="Another text. " * 9)
    with pytest.raises(UserError, match=r"shares 1 article .*; where titles tell nothing, data.articles=context"):
        disjoint(train, [*test[4:], stray], "data.validation", ("a", "b"))


def test_what_is_nearly_equal_is_told_and_not_refused():
    train = questions()
    test = [
        changed(e, title=f"t{e.title}", question=f"{e.question}?", context=f"Once: {e.context.replace('corn', 'rye')}")
        for e in train
    ]
    line = disjoint(train, test, "data.validation", ("train.json", "dev.json"))
    assert line == (
        "data.validation: beside train.json, 0 of 15 contexts and 0 of 60 questions are equal, 15 more contexts "
        "nearly; babl overlap shows which"
    )
    asked = [changed(e, title="t", context=f"{e.id} says nothing of it.") for e in train]
    assert "60 of 60 questions are equal, 0 more" in disjoint(train, asked, "data.validation", ("a", "b"))
    chinese = "老人把钥匙埋在石阶下面，他的父亲每天清晨擦拭灯塔的玻璃。"
    one, other = (Example(t, t, f"{t}？", c, ()) for t, c in (("甲", chinese), ("乙", chinese.replace("老人", "船长"))))
    assert shared([one], [other]).near == 1


def test_questions_without_a_context_are_the_same_by_their_own_words():
    def alone(qid, title, question):
        return Example(qid, title, question, "", ())

    train = [alone("a", "t1", "Who built it?"), alone("b", "t2", "Who left?")]
    assert shared(train, [alone("c", "t3", "Who came?")]).articles == []
    assert shared(train, [alone("c", "t3", "WHO  left?")]).articles == ["t2"]


def test_paragraphs_under_two_spellings_of_a_title_are_one_article():
    spelled = ["Dún_Mór", "DÚN MÓR", unicodedata.normalize("NFD", "dún_mór"), "Crête", "Other"]
    examples = [Example(str(i), title, f"q{i}", f"context {i}", ()) for i, title in enumerate(spelled)]
    examples.append(Example("6", "Copied", "q6", "CONTEXT  3", ()))
    names = articles(examples)
    assert names[0] == names[1] == names[2] and names[3] == names[5] and len(set(names)) == 3
    for seed in range(20):
        train, held = split_by_article(examples, 0.3, seed)
        sides = {e.id: e in held for e in examples}
        assert train and held and sides["0"] == sides["1"] == sides["2"] and sides["3"] == sides["6"]


def test_an_article_keeps_its_name_and_the_split_of_plain_files_stays_as_it_was():
    examples = questions()
    assert articles(examples) == [e.title for e in examples]
    train, held = split_by_article(examples, 0.2, seed=0)
    first = min(TOWNS, key=lambda title: hashlib.sha256(f"0/{title}".encode()).digest())
    assert {e.title for e in held} == {first} and len(train) + len(held) == 60
