"""Every rule is stated a second time here, naively, and both must count the same."""

import math
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from babl.data import overlap as module
from babl.data.fictional import fictional_corpus
from babl.data.kinds import answer_kind
from babl.data.overlap import DECLARED, OVERLAP_BIASES, find_overlap
from babl.data.overlap_report import markdown
from babl.data.squad import Answer, Example, load_squad, parse_squad
from babl.text.normalize import normalize_answer as normal

DOCS = Path(__file__).parents[2] / "docs" / "overlap.md"


def example(qid, question="Who?", context="somebody did it", answers=("somebody",), title="T"):
    return Example(qid, title, question, context, tuple(Answer(text, 0) for text in answers))


def grams(context, n):
    tokens = normal(context).split()
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def golds(e):
    return {normal(answer.text) for answer in e.answers if normal(answer.text)}


def tfidf(questions):
    """Question in normal form -> unit vector, over the different questions there are."""
    forms = {normal(question) for question in questions}
    found_in = Counter(word for form in forms for word in set(form.split()))
    vectors = {}
    for form in forms:
        weights = {
            w: n * (math.log((1 + len(forms)) / (1 + found_in[w])) + 1) for w, n in Counter(form.split()).items()
        }
        length = math.sqrt(sum(weight**2 for weight in weights.values()))
        vectors[form] = {word: weight / length for word, weight in weights.items()}
    return vectors


def same_articles(examples):
    """A number for each question, the same where titles or contexts are, or lead to one another."""
    keys = [{"t" + e.title.casefold().replace("_", " "), "c" + e.context.casefold()} for e in examples]
    before, numbers = None, list(range(len(examples)))
    while numbers != before:  # the least number spreads to whatever shares a key
        before, least = numbers, {}
        for number, of in sorted(zip(numbers, map(sorted, keys), strict=True), reverse=True):
            least |= dict.fromkeys(of, number)
        numbers = [min(least[key] for key in of) for of in keys]
    return numbers


def naive(train, test):
    """Question id -> (article, context equal, containments, question equal, Jaccard, cosine, answer, told, classes)."""
    vectors = tfidf([e.question for e in [*train, *test]])
    theirs = {normal(e.question) for e in train}
    contexts = {e.context for e in train}
    their_grams = {n: [grams(context, n) for context in contexts] for n in (8, 13)}
    their_answers = set().union(*map(golds, train))
    padded = [f" {normal(context)} " for context in contexts]
    holders = Counter(word for text in padded for word in set(text.split()))
    their_words = [set(form.split()) for form in theirs]
    their_vectors = [vectors[form] for form in theirs]
    near, contained = {}, {}
    for form in {normal(e.question) for e in test}:
        mine = set(form.split())
        jaccard = max(len(mine & words) / (len(mine | words) or 1) for words in their_words)
        weights = vectors[form]
        cosine = max(sum([weights[word] * other[word] for word in weights.keys() & other]) for other in their_vectors)
        near[form] = jaccard, cosine
    for context in {e.context for e in test}:
        for n in (8, 13):
            mine = grams(context, n)
            contained[context, n] = max(len(mine & other) for other in their_grams[n]) / len(mine) if mine else 0
    result, numbers = {}, same_articles([*train, *test])
    for e, number in zip(test, numbers[len(train) :], strict=True):
        form = normal(e.question)
        equal, (jaccard, cosine) = form in theirs, near[form]
        known = bool(golds(e) & their_answers)
        marks = {normal(word) for word in e.question.split()[1:] if word[0].isupper()}
        rare = [word for word in marks if word and holders[word] <= max(10, len(contexts) / 100)]
        told = any(f" {word} " in text and f" {gold} " in text for text in padded for word in rare for gold in golds(e))
        classes = [
            "question" if equal or jaccard >= j or cosine >= c else "answer" if known else "none"
            for j, c in ((0.8, 0.9), (0.6, 0.7))
        ]
        result[e.id] = (
            number in numbers[: len(train)],
            normal(e.context) in {normal(context) for context in contexts},
            contained[e.context, 8],
            contained[e.context, 13],
            equal,
            jaccard,
            cosine,
            known,
            told,
            *classes,
        )
    return result


def found(train, test):
    return {
        qid: (
            q.article,
            q.context_equal,
            q.containment[8],
            q.containment[13],
            q.question_equal,
            q.jaccard,
            q.cosine,
            q.answer,
            q.told,
            q.strict,
            q.loose,
        )
        for qid, q in find_overlap(train, test).questions.items()
    }


def assert_same(train, test):
    ours, theirs = found(train, test), naive(train, test)
    assert list(ours) == [e.id for e in test]
    for qid in theirs:
        assert ours[qid] == pytest.approx(theirs[qid], abs=1e-12), qid


def random_sets(seed):
    """Two sets that copy from each other, with edits, in all the ways that are counted."""
    rng = random.Random(seed)
    vocabulary = [
        "the",
        "a",
        "red",
        "Blue",
        "river",
        "Tower",
        "king",
        "of",
        "in",
        "Rome",
        "built",
        "men;",
        "who",
        "What",
    ]

    def text(length, sources, noise):
        made = []
        while len(made) < length:
            if sources and rng.random() < 0.5:
                source = rng.choice(sources).split()
                start = rng.randrange(len(source))
                made += [w if rng.random() > noise else rng.choice(vocabulary) for w in source[start : start + 25]]
            else:
                made += rng.choices(vocabulary, k=5)
        return " ".join(made[:length])

    def examples(name, count, contexts, questions):
        for i in range(count):
            context = text(rng.randrange(3, 70), contexts, 0.01) + rng.choice(["", f" Name{rng.randrange(20)}"])
            question = text(rng.randrange(1, 12), questions, 0.2) + rng.choice(["", f" Name{rng.randrange(20)}?"])
            tokens = context.split()
            starts = [rng.randrange(len(tokens)) for _ in range(rng.randrange(3))]
            answers = [" ".join(tokens[start : start + rng.randrange(1, 5)]) for start in starts]
            yield example(f"{name}{i}", question, context, answers, f"{name}_{i // 3}" if i % 7 else "Both of_them")

    train = list(examples("train", 40, [], []))
    return train, list(examples("test", 40, [e.context for e in train], [e.question for e in train]))


@pytest.mark.parametrize("seed", range(6))
def test_counts_what_the_rules_say(seed, monkeypatch):
    monkeypatch.setattr(module, "CONTEXT_BLOCK", 7)
    monkeypatch.setattr(module, "QUESTION_BLOCK", 5)
    assert_same(*random_sets(seed))


def test_the_random_sets_have_something_of_everything():
    rows = [row for seed in range(6) for row in found(*random_sets(seed)).values()]
    for i in (0, 4, 7, 8):
        assert {row[i] for row in rows} == {True, False}
    for i in (2, 3):
        assert any(0.5 <= row[i] < 0.8 for row in rows) and any(0.8 <= row[i] < 1 for row in rows)
    for i in (9, 10):
        assert {row[i] for row in rows} == {"question", "answer", "none"}
    assert any(row[9] != row[10] for row in rows)


def test_counts_what_the_rules_say_on_the_embedded_corpus():
    assert_same(*(parse_squad(data, "corpus") for data in fictional_corpus(4, 3)))


def test_counts_what_the_rules_say_on_real_files(shared):
    data = shared / "data" / "squad"
    test = load_squad(data / "dev-v1.1-xquad-en.json")
    assert_same(load_squad(data / "dev-v2.0-slice.json"), test)
    assert_same(load_squad(data / "train-v1.1-slice.json"), test)


@pytest.mark.parametrize("name", ["train-v1.1-slice", "dev-v2.0-slice"])
def test_the_figures_in_the_docs_are_those_of_the_files(shared, name):
    data = shared / "data" / "squad"
    train, test = load_squad(data / f"{name}.json"), load_squad(data / "dev-v1.1-xquad-en.json")
    text = markdown(find_overlap(train, test))
    tables = re.findall(r"(?:^\|.*\n)+", text[: text.index("## ")], flags=re.MULTILINE)
    docs = DOCS.read_text(encoding="utf-8")
    section = docs[docs.index(f"babl overlap {name}.json") :]
    assert len(tables) == 4
    for table in tables:
        assert table in section


def test_the_docs_have_what_is_declared():
    docs = DOCS.read_text(encoding="utf-8")
    for row in DECLARED:
        assert f"| {row.checkpoints} | {row.saw} | {row.raises} | {row.source} |" in docs
    for bias in OVERLAP_BIASES:
        assert f"- {bias}\n" in docs


def test_a_short_context_inside_a_long_one_is_contained_but_not_the_other_way_round():
    long = " ".join(f"w{i}" for i in range(200))
    short = " ".join(f"w{i}" for i in range(50, 70))
    (row,) = find_overlap([example("a", context=long)], [example("b", context=short)]).questions.values()
    assert row.containment == {8: 1.0, 13: 1.0} and not row.context_equal
    (row,) = find_overlap([example("a", context=short)], [example("b", context=long)]).questions.values()
    assert row.containment == {8: 13 / 193, 13: 8 / 188}


def test_containment_is_in_one_context_not_in_all_together():
    halves = [" ".join(f"w{i}" for i in part) for part in (range(0, 40), range(33, 73))]
    whole = " ".join(f"w{i}" for i in range(73))
    train = [example(str(i), context=half) for i, half in enumerate(halves)]
    assert find_overlap(train, [example("b", context=whole)]).questions["b"].containment[8] == 33 / 66


def test_the_classes_are_those_of_lewis():
    train = [
        example("t1", "Who led the Norman army at Hastings in the year 1066?", answers=("William",)),
        example("t2", "Which river flows through London?", answers=("the Thames",)),
    ]
    test = [
        example("equal", "who led the norman army at Hastings, in the year 1066", answers=("Harold",)),
        example("paraphrased", "Who led the Norman army in 1066 at Hastings?", answers=("William!",)),
        example("loosely", "Which great river flows through old London?", answers=("Rhine",)),
        example("answer", "What is dirty?", answers=("nothing", "Thames")),
        example("none", "What is clean?", answers=("Isar",)),
        example("impossible", "What is it?", answers=()),
        example("only an article", "What is that?", answers=("the",)),
    ]
    overlap = find_overlap(train, test)
    strict = {"equal": "question", "paraphrased": "question", "loosely": "none", "answer": "answer"}
    rest = {"none": "none", "impossible": "none", "only an article": "none"}
    assert overlap.classes == strict | rest
    assert overlap.loose_classes == strict | {"loosely": "question"} | rest
    assert overlap.summary["classes"] == {
        "strict": {"question": 2, "answer": 1, "none": 4},
        "loose": {"question": 3, "answer": 1, "none": 3},
    }
    assert overlap.summary["questions"] == {
        "equal": 1,
        "equal_same_answer": 0,
        "paraphrased": 1,
        "paraphrased_same_answer": 1,
    }
    nearest = overlap.questions["paraphrased"]
    assert (nearest.nearest, nearest.same_answer) == ("t1", True)
    assert sum(n["questions"] for n in overlap.summary["answers"].values()) == 6
    assert overlap.summary["answers"][answer_kind("nothing")]["known"] == 1


def test_questions_without_a_word_are_like_nothing_but_themselves():
    rows = find_overlap([example("t", "The?")], [example("a", "A?"), example("b", "Who?")]).questions
    assert (rows["a"].strict, rows["a"].nearest, rows["a"].cosine) == ("question", "t", 0)
    assert (rows["b"].strict, rows["b"].nearest) == ("answer", None)


def test_an_answer_beside_a_rare_name_is_told_and_beside_a_common_one_is_not():
    contexts = [f"Hastings is in Sussex, number {i}" for i in range(11)] + ["At Senlac the men of William stood"]
    train = [example(str(i), context=context) for i, context in enumerate(contexts)]
    test = [
        example("rare", "Whose men stood at Senlac?", answers=("William",)),
        example("common", "Which county has Hastings?", answers=("Sussex",)),
        example("first word", "Senlac is the hill of whom?", answers=("William",)),
        example("part of a word", "Whose men stood at Senlac?", answers=("Will",)),
    ]
    questions = find_overlap(train, test).questions
    assert [qid for qid, q in questions.items() if q.told] == ["rare"]


def test_the_same_text_is_equal_here_whatever_titles_case_and_unicode_form_it_has():
    context = "Der Müller von Ådal mahlt im Herbst das Korn der fünf Dörfer am Fluss."
    train = [example("a", "Was mahlt der Müller?", context, title="Ådal_am_Fluss")]
    spelled = [
        unicodedata.normalize("NFD", text) for text in ("WAS MAHLT DER MÜLLER?", context.upper(), "ådal am fluss")
    ]
    found = find_overlap(train, [example("b", spelled[0], spelled[1], title=spelled[2])]).questions["b"]
    assert found.context_equal and found.question_equal and found.article and found.strict == "question"


def test_an_article_under_another_title_is_the_same_article_here_too():
    contexts = [f"The mill of village {i} has {i + 2} wheels." for i in range(6)]
    train = [example(f"a{i}", f"Wheels of {i}?", context, title="Mills") for i, context in enumerate(contexts)]
    test = [example(f"b{i}", f"Wheels of {i}?", context.upper(), title=f"M{i}") for i, context in enumerate(contexts)]
    found = find_overlap(train, [*test, example("c", "Who?", "Nobody came.", title="Else")])
    assert [q.article for q in found.questions.values()] == [True] * 6 + [False]
    assert found.summary["train"]["articles"] == 1 and found.summary["test"]["articles"] == 2
    assert "| articles | 1 | 2 | 1 |" in markdown(found)
