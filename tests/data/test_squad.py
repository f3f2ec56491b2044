import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from babl.data.squad import Example, load_squad, parse_squad, split_by_article, to_squad
from babl.errors import UserError


def squad(**qa):
    question = {"id": "q1", "question": "Who?", "answers": [{"text": "née", "answer_start": 2}]} | qa
    return {"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "💡 née Bo", "qas": [question]}]}]}


def write(tmp_path, content):
    path = tmp_path / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "questions", "articles", "unanswerable"),
    [("train-v1.1-slice", 4370, 12, 0), ("dev-v1.1-xquad-en", 1190, 48, 0), ("dev-v2.0-slice", 418, 2, 214)],
)
def test_reads_real_files(shared, name, questions, articles, unanswerable):
    path = shared / "data" / "squad" / f"{name}.json"
    examples = load_squad(path)
    assert len(examples) == questions
    assert len({e.title for e in examples}) == articles
    assert sum(e.impossible for e in examples) == unanswerable
    assert parse_squad(to_squad(examples), "again") == examples


def test_offsets_count_code_points(tmp_path):
    (example,) = load_squad(write(tmp_path, squad()))
    assert example.answers[0].text == "née"


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answer": "Bo"}, [("Bo", 6)]),
        ({"answers": ["Bo", "née"]}, [("Bo", 6), ("née", 2)]),
        ({"answers": [{"text": "Bo", "answer_start": 6}]}, [("Bo", 6)]),
        ({"answers": {"text": ["Bo"], "answer_start": [6]}}, [("Bo", 6)]),
        ({"answers": []}, []),
        ({"answer": ""}, []),
    ],
)
def test_reads_lines_in_every_form(tmp_path, row, answers):
    line = json.dumps({"question": "Who?", "context": "💡 née Bo"} | row, ensure_ascii=False)
    first, second = load_squad(write(tmp_path, f"\ufeff{line}\n\n{line}\n"))
    assert [(a.text, a.start) for a in first.answers] == answers
    assert (first.id, second.id) == ("line-1", "line-3")
    assert first.title == second.title


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            squad(answers=[{"text": "Bob", "answer_start": 6}]),
            r"qas\[0\]\.answers\[0\] of q1: expected 'Bob' at offset 6, found 'Bo'",
        ),
        (squad(answers=[{"text": "née", "answer_start": -1}]), r"expected 'née' at offset -1, found ''"),
        (squad(question=3), r"data\[0\]\.paragraphs\[0\]\.qas\[0\]\.question: expected a string, found int"),
        (squad(answers="née"), r"answers: expected a list, found str"),
        ({"data": [{"title": "T"}]}, r"data\[0\]\.paragraphs is missing"),
        ({"data": []}, r"no question in it"),
        ('{"data": [\n{"title": }]}', r"malformed JSON at line 2 column 11"),
        ('{"question": "a", "context": "b", "answer": "c"}', r"line 1\.answers\[0\] of line-1: 'c' is nowhere in"),
        ('{"question": "a", "context": "b", "answer": "b"}\n{"question": "a"', r"malformed JSON at line 2 column"),
        ('{"question": "a", "answer": "b"}', r"line 1\.context is missing"),
        ("  \n", r"the file is empty"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        load_squad(write(tmp_path, content))
    assert "\n" not in str(error.value) and "data.json" in str(error.value)


def test_duplicate_ids_name_both_places(tmp_path):
    tree = squad()
    tree["data"] *= 2
    with pytest.raises(UserError, match=r"id q1 at data\[1\]\S+ stands already at data\[0\]"):
        load_squad(write(tmp_path, tree))


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="no such data file"):
        load_squad(tmp_path / "absent.json")
    with pytest.raises(UserError, match="cannot be read"):
        load_squad(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"data": "\xe9"}')
    with pytest.raises(UserError, match="cannot be read"):
        load_squad(tmp_path / "latin.json")


@given(st.lists(st.integers(0, 9), min_size=2, max_size=80), st.floats(0.05, 0.5), st.integers(0, 5))
def test_the_validation_slice_shares_no_article(articles, fraction, seed):
    examples = [Example(str(i), f"t{a}", "q", "c", ()) for i, a in enumerate(articles)]
    if len(set(articles)) < 2:
        with pytest.raises(UserError, match="at least 2 articles"):
            split_by_article(examples, fraction, seed)
        return
    train, validation = split_by_article(examples, fraction, seed)
    assert train and validation and len(train) + len(validation) == len(examples)
    assert not {e.title for e in train} & {e.title for e in validation}
