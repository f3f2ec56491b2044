"""The scores are stated a second time here, naively, and both must be the same."""

import gzip
import json
import random
import tracemalloc

import numpy as np
import pytest

from babl.data import corpus as module
from babl.data.corpus import NGrams, corpus_overlap, read_documents
from babl.data.squad import Answer, Example
from babl.errors import UserError
from babl.text.normalize import normalize_answer


def example(qid, question, context="c", answers=("c",)):
    return Example(qid, "T", question, context, tuple(Answer(text, 0) for text in answers))


def numbered(*numbers):
    return " ".join(f"w{number}" for number in numbers)


def exposure(text, *documents):
    """Of a text that is a question."""
    return corpus_overlap([example("q", text)], documents).exposures["question"]["q"]


def stands(part, whole):
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


def naive(text, documents, n):
    """(words, any n-gram, share of 8-grams, share of words in matches, longest run)."""
    text, documents = normalize_answer(text).split(), [normalize_answer(d).split() for d in documents]

    def hits(n):
        return [any(stands(text[i : i + n], d) for d in documents) for i in range(len(text) - n + 1)]

    inside = set()
    for document in documents:
        for i in range(len(text)):
            for j in range(len(document)):
                if text[i : i + 10] != document[j : j + 10] or len(text[i : i + 10]) < 10:
                    continue
                for length in range(11, min(len(text) - i, len(document) - j) + 1):
                    pairs = list(zip(text[i : i + length], document[j : j + length], strict=True))
                    if pairs[-1][0] == pairs[-1][1] and sum(a != b for a, b in pairs) <= 4:
                        inside |= set(range(i, i + length))
    runs = [
        length
        for i in range(len(text))
        for length in range(1, len(text) - i + 1)
        if any(stands(text[i : i + length], d) for d in documents)
    ]
    eight = hits(8)
    return (
        len(text),
        any(hits(n)) if len(text) >= n else None,
        sum(eight) / len(eight) if eight else None,
        len(inside) / len(text) if len(text) > 10 else None,
        max(runs, default=0),
    )


def random_texts(seed):
    """Texts, and documents with parts of them in which words were changed."""
    rng = random.Random(seed)
    vocabulary = ["the", "River,", "Tower", "in", "Rome", "of", "1066"]
    texts = [" ".join(rng.choices(vocabulary, k=rng.choice([3, 9, 12, 30, 45]))) for _ in range(12)]
    documents = []
    for _ in range(15):
        part = rng.choice(texts).split()[rng.randrange(8) :]
        for _ in range(rng.randrange(7)):
            if part:
                part[rng.randrange(len(part))] = rng.choice([*vocabulary, "Unheard"])
        around = [rng.choices([*vocabulary, "Unheard"], k=rng.randrange(12)) for _ in range(2)]
        documents.append(" ".join([*around[0], *part, *around[1]]))
    return texts, documents


@pytest.mark.parametrize("seed", range(8))
def test_scores_are_what_the_rules_say(seed, monkeypatch):
    monkeypatch.setattr(module, "BATCH_WORDS", 60)
    monkeypatch.setattr(module, "HITS", 3)
    texts, documents = random_texts(seed)
    examples = [
        example(str(i), question, context, (answer,))
        for i, (question, context, answer) in enumerate(zip(texts, texts[1:], texts[2:], strict=False))
    ]
    found = corpus_overlap(examples, documents)
    assert found.documents == len(documents)
    for e in examples:
        fields = {"question": e.question, "context": e.context, "answer": e.answers[0].text}
        fields["question+answer"] = f"{e.question} {e.answers[0].text}"
        for field, text in fields.items():
            got = found.exposures[field][e.id]
            got = (got.words, got.ngram, got.eightgrams, got.matched, got.longest)
            assert got == naive(text, documents, found.ngram_words[field]), (field, text)


def test_the_random_texts_have_something_of_everything():
    rows = [naive(text, documents, 8) for texts, documents in map(random_texts, range(8)) for text in texts]
    assert {row[1] for row in rows} == {None, True, False}
    for i in (2, 3):
        assert any(row[i] == 0 for row in rows) and any(row[i] == 1 for row in rows)
        assert any(row[i] is not None and 0 < row[i] < 1 for row in rows)


TEXT = list(range(30))


def changed(*places):
    return numbered(*(900 if number in places else number for number in TEXT))


@pytest.mark.parametrize(
    ("document", "matched"),
    [
        (numbered(*TEXT), 30),
        (numbered(*range(10)), 0),  # ten words are not more than ten
        (numbered(*range(11)), 11),
        (changed(10, 14, 18, 22), 30),  # what is skipped is inside
        (changed(10, 14, 18, 22, 26), 26),  # the fifth ends it
        (changed(9), 20),  # not among the first ten: begins after it
        (changed(4, 15, 26), 10 + 15),  # between 5 and 14 are ten words, which reach over 15 and 26
        (changed(10, 27, 28, 29), 27),  # nothing that differs at its end
        (changed(10, 11, 12, 13, 28), 30),  # the first match ends before 28, the one from 14 on skips it
        (numbered(*range(15), 900, *range(15, 30)), 30),  # an insertion: two matches
        (numbered(*range(8), 900, *range(8, 16), 900, *range(16, 30)), 14),
    ],
)
def test_a_match_skips_up_to_four_words_behind_the_tenth(document, matched):
    assert exposure(numbered(*TEXT), document).matched == pytest.approx(matched / 30)


def test_no_match_reaches_over_the_end_of_a_document():
    found = exposure(numbered(*TEXT), numbered(*range(6)), numbered(*range(6, 13)), numbered(*range(13, 20)))
    assert (found.longest, found.ngram, found.eightgrams, found.matched) == (7, False, 0, 0)


def test_texts_too_short_for_a_score_have_none():
    found = exposure(numbered(*range(7)), numbered(*range(7)))
    assert (found.words, found.ngram, found.eightgrams, found.matched, found.longest) == (7, None, None, None, 7)
    assert exposure("The?", "the").words == 0


def test_the_n_of_gpt3_is_the_fifth_percentile_within_8_and_13():
    long, middle, short = (numbered(*range(length)) for length in (40, 10, 3))
    examples = [example(str(i), long, middle, (short,)) for i in range(99)] + [example("last", short, short, (short,))]
    words = corpus_overlap(examples, []).ngram_words
    assert words == {"question": 13, "context": 10, "answer": 8, "question+answer": 13}


def test_a_question_without_an_answer_has_scores_for_the_rest():
    found = corpus_overlap([example("q", "who", answers=())], ["who"])
    assert {field for field, scores in found.exposures.items() if scores} == {"question", "context"}
    assert found.summary["fields"].keys() == {"question", "context"}


def test_the_summary_counts_clean_and_dirty_questions():
    texts = [numbered(*range(100 * i, 100 * i + 20)) for i in range(4)]
    examples = [example(str(i), text) for i, text in enumerate(texts)]
    documents = [texts[0], numbered(*range(100, 114)), numbered(200, 201, 202)]
    summary = corpus_overlap(examples, documents).summary
    assert summary["documents"] == 3
    assert summary["fields"]["question"] == {
        "questions": 4,
        "gpt3": {"n": 13, "measured": 4, "dirty": 2},
        "palm": {"measured": 4, "dirty": 1},  # 7 of the second's 13 8-grams are no 70 %
        "llama2": {"measured": 4, "clean": 2, "dirty": 1},
        "longest": {"median": 8.5, "max": 20, "whole": 1},
    }


def test_ngrams_are_found_where_they_stand_and_by_the_same_name():
    texts = [["a", "b", "a", "b", "c"], ["b", "c"]]
    grams = NGrams(texts, 3)
    ids, owner = grams.encode([["x", "b", "c", "a"], ["b", "a", "b"]])
    assert owner.tolist() == [0] * 5 + [1] * 4
    found = {n: dict(zip(at.tolist(), names.tolist(), strict=True)) for n, at, names in grams.find(ids)}
    assert [sorted(places) for places in found.values()] == [[1, 2, 3, 5, 6, 7], [1, 5, 6], [5]]
    for n, places in found.items():
        for at, name in places.items():
            there = grams.places[n - 1][grams.names[n - 1] == name]
            assert all(np.array_equal(grams.ids[p : p + n], ids[at : at + n]) for p in there) and len(there)


def test_memory_does_not_grow_with_the_corpus():
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(500)]
    examples = [example(str(i), " ".join(rng.choices(vocabulary, k=12))) for i in range(50)]

    def documents(count):
        for i in range(count):
            yield f"{' '.join(rng.choices(vocabulary, k=60))} only{i} {examples[i % 50].question}"

    def peak(count):
        tracemalloc.start()
        corpus_overlap(examples, documents(count))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(10_000) < 1.1 * peak(2_000)


def write(path, text):
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_documents_are_read_from_text_and_json_lines(tmp_path, packed):
    first = write(tmp_path / f"a.txt{packed}", "one\n\ntwo, é\n")
    second = write(tmp_path / f"b.jsonl{packed}", '{"text": "three", "url": "u"}\n' + json.dumps({"text": "vier\n"}))
    third = write(tmp_path / f"c4-train.00000-of-01024.json{packed}", '{"text": "five"}\n')
    found = [text.rstrip() for text in read_documents([first, second, third])]
    assert found == ["one", "two, é", "three", "vier", "five"]


def test_documents_are_read_as_they_are_asked_for(tmp_path):
    shard = write(tmp_path / "a.jsonl", '{"text": "one"}\nnot JSON\n')
    documents = read_documents([shard])
    assert next(documents) == "one"
    with pytest.raises(UserError, match=r"a\.jsonl: malformed JSON at line 2 column 1"):
        next(documents)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", r"a\.txt: no document in it"),
        ("a.csv", "a,b", r"a\.csv: a corpus file ends in \.txt, \.jsonl or \.json, or in one of them and \.gz"),
        ("a.csv.gz", "a,b", r"a\.csv\.gz: a corpus file ends in"),
        ("a.jsonl", '{"text": "one"}\n{"txt": "two"}\n', r'a\.jsonl: line 2 has no "text" that is a string'),
        ("a.jsonl", '{"text": "one"}\n[1]\n', r"a\.jsonl: line 2 has no"),
        ("a.jsonl", '{"text": 1}\n', r"a\.jsonl: line 1 has no"),
    ],
)
def test_a_wrong_corpus_file_is_named(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        list(read_documents([write(tmp_path / name, text)]))


def test_an_unreadable_corpus_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.txt: no such corpus file"):
        read_documents([tmp_path / "absent.txt"])
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\n")
    whole = write(tmp_path / "whole.txt.gz", "one\n" * 10_000).read_bytes()
    (tmp_path / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "plain.txt.gz").write_text("one\n")
    for name in ("bytes.txt", "cut.txt.gz", "plain.txt.gz"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            list(read_documents([tmp_path / name]))
