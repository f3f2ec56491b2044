import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from babl.data.articles import split_by_article
from babl.data.squad import Example, Reading, load_golds, load_squad, parse_squad, to_squad
from babl.errors import UserError

CONTEXT = "💡 née Bo"


def squad(version="1.1", **qa):
    question = {"id": "q1", "question": "Who?", "answers": [{"text": "née", "answer_start": 2}]} | qa
    return {"version": version, "data": [{"title": "T", "paragraphs": [{"context": CONTEXT, "qas": [question]}]}]}


def many(*answers, context=CONTEXT):
    """A set of one question for each list of (text, offset)."""
    qas = [
        {"id": f"q{i}", "question": "Who?", "answers": [{"text": t, "answer_start": s} for t, s in each]}
        for i, each in enumerate(answers)
    ]
    return {"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": context, "qas": qas}]}]}


def write(tmp_path, content, name="data.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def read(path, **reading):
    told = []
    return load_squad(path, Reading(**reading), told.append), told[0].removeprefix(f"{path}: ")


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
    assert example.answers[0].text == "née" and example.span == (2, 5)


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answer": "Bo"}, [("Bo", 6)]),
        ({"answer": "Bo", "answer_start": 6}, [("Bo", 6)]),
        ({"answers": ["Bo", "née"]}, [("Bo", 6), ("née", 2)]),
        ({"answers": [{"text": "Bo", "answer_start": 6}]}, [("Bo", 6)]),
        ({"answers": {"text": ["Bo"], "answer_start": [6]}}, [("Bo", 6)]),
        ({"answers": {"text": "Bo", "answer_start": 6}}, [("Bo", 6)]),
        ({"answers": {"text": ["Bo"], "answer_start": [6.0]}}, [("Bo", 6)]),
        ({"answers": {"text": ["Bo"]}}, [("Bo", 6)]),
        ({"answers": [{"text": "Bo", "answer_start": -1}]}, [("Bo", 6)]),
        ({"answers": []}, []),
        ({"answer": ""}, []),
        ({"answer": None}, []),
    ],
)
def test_reads_answers_in_every_form(tmp_path, row, answers):
    line = json.dumps({"question": "Who?", "context": CONTEXT} | row, ensure_ascii=False)
    first, second = load_squad(write(tmp_path, f"\ufeff{line}\r\n\r\n{line}\r\n"))
    assert [(a.text, a.start) for a in first.answers] == answers
    assert (first.id, second.id) == ("line-1", "line-3")
    assert first.title == second.title


def test_what_is_scored_is_the_file_s_and_what_is_trained_on_the_context_s(tmp_path):
    context = "In the  old\ntown lived Jose\u0301 of Martens."
    tree = many([("old town", 8)], [("José", 23)], [("Marten", 30)], [("Peru", 3), ("town", 12)], context=context)
    examples, line = read(write(tmp_path, tree))
    assert [e.answers[0].text for e in examples] == ["old town", "José", "Marten", "Peru"]
    assert [e.target for e in examples] == ["old\ntown", "Jose\u0301", "Marten", "town"]
    assert examples[3].answers[0].start is None
    assert line == "4 questions, 5 answers: 1 exact, 2 whitespace, 1 moved, 1 not found"
    again, _ = read(write(tmp_path, to_squad(examples)))
    assert again == examples


def test_strict_names_the_first_five_places_and_counts_each_kind(tmp_path):
    wrong = [[("Bo", 5)]] * 3 + [[("Peru", 0)]] * 4 + [[("née  Bo", 2)]]
    path = write(tmp_path, many([("Bo", 6)], *wrong))
    with pytest.raises(UserError) as error:
        load_squad(path, Reading(strict=True))
    message = str(error.value)
    assert "8 of 9 answers do not stand where the file says: 1 exact, 1 whitespace, 3 moved, 4 not found" in message
    assert "qas[1].answers[0] of q1: no 'Bo' at offset 5, but 'Bo' at 6" in message
    assert [f"of q{i}:" in message for i in range(9)] == [False] + 5 * [True] + 3 * [False]
    assert len(load_squad(path)) == 9
    spelled = {"question": "Who?", "context": "the caf\u00e9 of Bo", "answer": "cafe\u0301"}
    with pytest.raises(UserError, match="but 'caf\u00e9' in other spaces or another Unicode form at 4; mend them"):
        load_squad(write(tmp_path, json.dumps(spelled)), Reading(strict=True))
    right = write(tmp_path, many([("Bo", 6)]))
    assert load_squad(right, Reading(strict=True)) == load_squad(right)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (squad(question=3), r"data\[0\]\.paragraphs\[0\]\.qas\[0\]\.question: expected a string, found int"),
        (squad(question=None), r"qas\[0\]\.question is missing"),
        (squad(id=True), r"qas\[0\]\.id: expected a string or an integer, found bool"),
        (squad(answers="née"), r"answers: expected a list, found str"),
        (squad(answers=None), r'answers is null; no answer is "answers": \[\]'),
        (squad(answers=[None]), r"answers\[0\] is missing"),
        (squad(answers=[{"text": "Bo", "answer_start": "6"}]), r"answer_start: expected an integer, found str"),
        (squad(answers={"text": ["a", "b"], "answer_start": [1]}), r"answers: 2 texts but 1 offsets"),
        (squad(answers=[{"text": "", "answer_start": 0}]), r'has an empty answer, where no answer is "answers": \[\]'),
        ({"data": [{"title": "T"}]}, r"data\[0\]: neither a question nor a list of them \(keys: title\)"),
        ({"data": [{"title": "T", "paragraphs": 3}]}, r"data\[0\]\.paragraphs: expected a list, found int"),
        ({"q1": "Bo"}, r"neither a question nor a list of them \(keys: q1\)"),
        ({"data": []}, r"no question in it"),
        ([3], r"row 1: expected an object, found int"),
        ('{"data": [\n{"title": }]}', r"malformed JSON at line 2 column 11"),
        ("[" * 100_000, r"malformed JSON"),
        ('{"question": "a", "context": "b", "answer": "b"}\n{"question": "a"', r"malformed JSON at line 2 column"),
        ('{"question": "a", "context": 1, "answer": "b"}', r"context: expected a string, found int"),
        ("  \n", r"the file is empty"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        load_squad(write(tmp_path, content))
    assert "\n" not in str(error.value) and "data.json" in str(error.value)


def lines(bad):
    rows = [{"id": str(i), "question": "Who?", "context": CONTEXT, "answer": "Bo"} for i in range(100)]
    return "\n".join(json.dumps(row) if i not in bad else bad[i] for i, row in enumerate(rows))


def test_the_faults_of_a_file_are_told_together_with_what_to_do(tmp_path):
    bad = {i: '{"id": "x", "question": 3, "answer": "Bo"}' for i in (4, 50, 51, 52)}
    bad |= {9: "not JSON", 20: '{"id": "0", "question": "Who?", "answer": "Bo"}', 70: "[]]"}
    path = write(tmp_path, lines(bad), "data.jsonl")
    with pytest.raises(UserError) as error:
        load_squad(path)
    message = str(error.value)
    assert "7 of 100 records cannot be read: " in message and "; and 2 more; " in message
    assert len(re.findall(r"line \d+", message.split("; and")[0])) == 6  # the id that stands twice names both places
    assert "id 0 at line 21 stands already at line 1" in message or "line 10" in message
    assert "leave it out with data.faulty=leave-out (--faulty leave-out)" in message
    examples, line = read(path, faulty="leave-out")
    assert len(examples) == 93 and line.endswith("; 7 records left out that cannot be read")
    with pytest.raises(UserError, match="none of 1 records can be read"):
        load_squad(write(tmp_path, squad(question=1)), Reading(faulty="leave-out"))


def test_an_answer_beside_is_impossible_is_a_contradiction(tmp_path):
    tree = squad("v2.0", is_impossible=True)
    path = write(tmp_path, tree)
    with pytest.raises(UserError, match=r"of q1 is_impossible, but has the answer 'née'.*--impossible unanswerable"):
        load_squad(path)
    (example,), line = read(path, impossible="unanswerable")
    assert example.impossible and line.endswith("; 1 is_impossible beside answers, read as unanswerable")
    (scored,) = load_golds(path)  # the official scripts read the answers alone
    assert [a.text for a in scored.answers] == ["née"]


@pytest.mark.parametrize(
    "empty", [[{"text": "", "answer_start": -1}], [""], [" "], {"text": [""], "answer_start": [0]}]
)
def test_an_empty_answer_is_none_where_the_file_says_so_and_refused_where_not(tmp_path, empty):
    (example,), line = read(write(tmp_path, squad("v2.0", is_impossible=True, answers=empty)))
    assert example.impossible and line.endswith("; 1 with empty answers, left out")
    path = write(tmp_path, squad("v2.0", answers=empty))
    with pytest.raises(UserError, match="of q1 has an empty answer"):
        load_squad(path)
    (example,), _ = read(path, impossible="unanswerable")
    assert example.impossible


def test_duplicate_ids_name_both_places(tmp_path):
    tree = squad()
    tree["data"] *= 2
    with pytest.raises(UserError, match=r"id q1 at data\[1\]\S+ stands already at data\[0\]"):
        load_squad(write(tmp_path, tree))


def test_a_lone_surrogate_is_replaced_and_moves_nothing(tmp_path):
    text = r'{"id": "\ud83d", "title": "T\udc00", "question": "\ud83d?", "context": "a \ud83d née", "answer": "née"}'
    (example,) = load_squad(write(tmp_path, text))
    for each in (example.id, example.title, example.question, example.context):
        each.encode()
    assert example.context == "a \ufffd née" and example.span == (4, 7)


def test_a_grade_is_a_text(tmp_path):
    grades = [load_squad(write(tmp_path, squad(grade=grade)))[0].grade for grade in (3, "easy", None)]
    assert grades == ["3", "easy", ""]


def test_the_version_of_the_file_is_kept_whatever_part_of_it_is_left(tmp_path):
    (only,) = load_squad(write(tmp_path, squad("v2.0")))
    assert only.version == "2.0" and to_squad([only])["version"] == "v2.0"
    rows = [{"question": "Who?", "context": CONTEXT, "answers": a} for a in (["Bo"], [])]
    first, _ = load_squad(write(tmp_path, "\n".join(map(json.dumps, rows))))
    assert first.version == "2.0" and to_squad([first])["version"] == "v2.0"
    assert to_squad(load_squad(write(tmp_path, squad())))["version"] == "1.1"


def test_the_order_of_questions_is_kept(tmp_path):
    rows = [{"id": str(i), "title": f"t{i % 3}", "question": "?", "context": "c", "answer": "c"} for i in range(9)]
    examples = load_squad(write(tmp_path, "\n".join(map(json.dumps, rows))))
    assert [e.id for e in parse_squad(to_squad(examples), "again")] == [str(i) for i in range(9)]


def test_scoring_reads_ids_and_gold_texts_alone(tmp_path):
    rows = [
        {"id": 7, "answers": [{"text": "Peru", "answer_start": 99}]},
        {"id": "b", "answers": {"text": ["x", ""], "answer_start": []}},
        {"id": "c", "question": 3, "context": "y", "answers": []},
    ]
    examples = load_golds(write(tmp_path, json.dumps(rows[0]) + "\n" + json.dumps(rows[2])))
    assert [(e.id, [a.text for a in e.answers]) for e in examples] == [("7", ["Peru"]), ("c", [])]
    with pytest.raises(UserError, match="2 texts but 0 offsets"):
        load_golds(write(tmp_path, json.dumps(rows[1])))
    told: list[str] = []
    path = write(tmp_path, "\n".join(map(json.dumps, rows)))
    assert [e.id for e in load_golds(path, Reading(faulty="leave-out"), told.append)] == ["7", "c"]
    assert told == [f"{path}: 2 questions; 1 records left out that cannot be read"]


def test_articles_without_a_name_are_told_apart_by_context_as_all_are_on_request(tmp_path):
    rows = [
        {"question": f"{i}?", "title": title, "context": context, "answer": "c"}
        for i, (title, context) in enumerate([("A", "c 1"), ("A", "c 2"), ("", "c 1"), (" ", "c 2"), (None, "c 2")])
    ]
    path = write(tmp_path, "\n".join(map(json.dumps, rows)))
    a, b, *rest = (e.title for e in load_squad(path))
    assert a == b == "A" and rest[1] == rest[2] != rest[0] and "A" not in rest
    by_context = [e.title for e in load_squad(path, Reading(articles="context"))]
    assert by_context[0] == by_context[2] != by_context[1] == by_context[3] == by_context[4]
    untitled = {"data": [{"paragraphs": [{"context": c, "qas": [{"question": "?", "answers": [c]}]} for c in "xy"]}]}
    assert len({e.title for e in load_squad(write(tmp_path, untitled))}) == 1  # an article has several paragraphs


def test_a_question_may_be_without_a_context(tmp_path):
    rows = [{"question": f"{i}?", "answer": "Bo"} | extra for i, extra in enumerate([{}, {"context": ""}])]
    examples, line = read(write(tmp_path, "\n".join(map(json.dumps, rows))))
    assert [(e.context, e.span, e.target) for e in examples] == [("", None, "Bo")] * 2
    assert len({e.title for e in examples}) == 2
    assert line.endswith("; 2 questions without a context")


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="no such data file"):
        load_squad(tmp_path / "absent.json")
    (tmp_path / "latin.json").write_bytes(b'{"data": "\xe9"}')
    with pytest.raises(UserError, match="is no utf-8 text at byte 10; save it as UTF-8"):
        load_squad(tmp_path / "latin.json")


@given(st.lists(st.integers(0, 9), min_size=2, max_size=80), st.floats(0.05, 0.5), st.integers(0, 5))
def test_the_validation_slice_shares_no_article(articles, fraction, seed):
    examples = [Example(str(i), f"t{a}", "q", f"c{a}", ()) for i, a in enumerate(articles)]
    if len(set(articles)) < 2:
        with pytest.raises(UserError, match=r"at least 2 articles, the data has 1; .* data\.articles=context"):
            split_by_article(examples, fraction, seed)
        return
    train, validation = split_by_article(examples, fraction, seed)
    assert train and validation and len(train) + len(validation) == len(examples)
    assert not {e.title for e in train} & {e.title for e in validation}
