import csv
import gzip
import json
import sys

import pytest

from babl.data.formats import data_hash
from babl.data.squad import load_squad
from babl.errors import UserError

ROWS = [  # of two articles, three contexts; texts with what formats trip over: quotes, commas, lines, and no ASCII
    ("1", "Rivers", 'The "Ilm", a river,\nrises near Öde.', "Where does it rise?", [("near Öde", 26), ("Öde", 31)]),
    ("2", "Rivers", 'The "Ilm", a river,\nrises near Öde.', "Which river?", [('"Ilm"', 4)]),
    ("3", "Rivers", "It is 12 km long.", "How long is it?", [("12 km", 6)]),
    ("4", "Towns", "Öde's mayor is O'Neil.", "Who's mayor?", [("O'Neil", 15)]),
]


def spread(rows=ROWS, wrap=lambda answers: [{"text": t, "answer_start": s} for t, s in answers]):
    return [
        {"id": i, "title": title, "context": context, "question": question, "answers": wrap(answers)}
        for i, title, context, question, answers in rows
    ]


def columns(answers):
    return {"text": [t for t, _ in answers], "answer_start": [s for _, s in answers]}


def squad():
    articles = {}
    for row in spread():
        paragraphs = articles.setdefault(row["title"], {})
        paragraphs.setdefault(row["context"], []).append({key: row[key] for key in ("id", "question", "answers")})
    data = [
        {"title": title, "paragraphs": [{"context": context, "qas": qas} for context, qas in paragraphs.items()]}
        for title, paragraphs in articles.items()
    ]
    return {"version": "1.1", "data": data}


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def mrqa():
    contexts = {}
    for row in spread():
        detected = [
            {"text": a["text"], "char_spans": [[a["answer_start"], a["answer_start"] + len(a["text"]) - 1]]}
            for a in row["answers"]
        ]
        qa = {"qid": row["id"], "question": row["question"], "answers": [a["text"] for a in row["answers"]]}
        contexts.setdefault(row["context"], []).append(qa | {"detected_answers": detected})
    rows = [{"id": "", "context": context, "qas": qas} for context, qas in contexts.items()]
    return lines([{"header": {"dataset": "Own", "split": "dev"}}, *rows])


def table(rows, write=str):
    from io import StringIO

    stream = StringIO()
    writer = csv.DictWriter(stream, rows[0])
    writer.writeheader()
    writer.writerows(row | {"answers": write(row["answers"])} for row in rows)
    return stream.getvalue()


def numpy_like(answers):
    """As pandas writes a cell of arrays."""
    return f"{{'text': array({answers['text']!r}, dtype=object), 'answer_start': array({answers['answer_start']!r})}}"


SHAPES = {
    "squad.json": lambda: json.dumps(squad()),
    "indented.json": lambda: json.dumps(squad(), indent=1, ensure_ascii=False),
    "lines.jsonl": lambda: lines(spread()),
    "columns.jsonl": lambda: lines(spread(wrap=columns)),
    "lines.json": lambda: lines(spread(wrap=columns)),
    "array.json": lambda: json.dumps(spread(wrap=columns)),
    "indented-array.json": lambda: json.dumps(spread(wrap=columns), indent=2),
    "rows.json": lambda: json.dumps({"data": spread(wrap=columns)}),
    "mrqa.jsonl": mrqa,
    "python.csv": lambda: table(spread(wrap=columns)),
    "json.csv": lambda: table(spread(wrap=columns), json.dumps),
    "numpy.csv": lambda: table(spread(wrap=columns), numpy_like),
}
ENCODINGS = {
    "plain": lambda text: text.encode(),
    "BOM": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "packed": lambda text: gzip.compress(text.encode()),
}


def summed(examples, titles=True):
    rows = sorted((e.id, e.title if titles else "", e.context, e.question, e.answers) for e in examples)
    return [(*row[:4], [(a.text, a.start) for a in row[4]]) for row in rows]


def is_what_was_written(examples, titles=True):
    return summed(examples, titles) == [(i, title if titles else "", *rest) for i, title, *rest in ROWS]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_holds_the_same_questions(tmp_path, name, encoding):
    path = tmp_path / (name + ".gz" * (encoding == "packed"))
    path.write_bytes(ENCODINGS[encoding](SHAPES[name]()))
    assert is_what_was_written(load_squad(path), titles=name != "mrqa.jsonl")


def test_tabs_part_columns_and_windows_ends_lines(tmp_path):
    rows = [{"id": "1", "question": "q?", "context": "c d", "answers": "['d']"}]
    (tmp_path / "a.tsv").write_text("\t".join(rows[0]) + "\r\n" + "\t".join(rows[0].values()) + "\r\n", newline="")
    (example,) = load_squad(tmp_path / "a.tsv")
    assert (example.context, example.span) == ("c d", (2, 3))


@pytest.mark.parametrize("packed", [False, True])
def test_parquet_holds_the_same_questions(tmp_path, packed):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "data.parquet"
    parquet.write_table(pa.Table.from_pylist([row | {"tokens": [1, 2]} for row in spread(wrap=columns)]), path)
    if packed:
        path = tmp_path / "data.parquet.gz"
        path.write_bytes(gzip.compress((tmp_path / "data.parquet").read_bytes()))
    assert is_what_was_written(load_squad(path))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(UserError, match=r'data\.parquet: .* pip install "babl\[data\]"'):
        load_squad(tmp_path / "data.parquet")


def test_damaged_parquet_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "data.parquet").write_bytes(b"PAR1\x00\x01PAR1")
    with pytest.raises(UserError, match=r"data\.parquet: cannot be read as Parquet") as error:
        load_squad(tmp_path / "data.parquet")
    assert "\n" not in str(error.value)


def test_integer_ids_and_tables_of_one_answer(tmp_path):
    (tmp_path / "a.csv").write_text("id,question,context,answer,answer_start\n7,q?,c c d,c,2\n8,q?,c,,\n")
    seven, eight = load_squad(tmp_path / "a.csv")
    assert (seven.id, seven.span, eight.id, eight.impossible) == ("7", (2, 3), "8", True)
    (tmp_path / "a.jsonl").write_text('{"id": 7, "question": "q?", "context": "c", "answer": "c"}')
    assert load_squad(tmp_path / "a.jsonl")[0].id == "7"


def test_a_folder_or_a_pattern_is_read_as_one_file(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "b.jsonl").write_text(lines(spread(ROWS[2:])))
    (folder / "a.json.gz").write_bytes(gzip.compress(json.dumps(spread(ROWS[:2])).encode()))
    (folder / "README.md").write_text("no data")
    assert [e.id for e in load_squad(folder)] == ["1", "2", "3", "4"]
    assert [e.id for e in load_squad(folder / "*.jsonl")] == ["3", "4"]
    whole = data_hash(folder)
    (folder / "b.jsonl").write_text(lines(spread(ROWS[3:])))
    assert len({whole, data_hash(folder), data_hash(folder / "*.jsonl"), data_hash(folder / "b.jsonl")}) == 3
    (folder / "c.json").write_text(json.dumps(spread(ROWS[:1])))
    with pytest.raises(UserError, match=r"id 1 at c\.json\[0\] stands already at a\.json\.gz\[0\]"):
        load_squad(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: the folder has no data file \(\.json, "):
        load_squad(tmp_path / "empty")
    with pytest.raises(UserError, match=r"\*\.csv: no such data file"):
        load_squad(tmp_path / "*.csv")


def test_offsets_of_a_table_with_gaps_are_whole_numbers(tmp_path):
    """As pandas writes a column of integers that some rows lack."""
    (tmp_path / "a.csv").write_text('context,question,answer,answer_start\n"a\nb a",q,a,4.0\na b,q,b,\n')
    assert [e.span for e in load_squad(tmp_path / "a.csv")] == [(4, 5), (2, 3)]


def test_files_with_a_bom_may_stand_behind_one_another(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join("\ufeff" + lines(spread([row])) for row in ROWS[:2]), encoding="utf-8")
    assert [e.id for e in load_squad(tmp_path / "a.jsonl")] == ["1", "2"]


@pytest.mark.parametrize("versions", [("1.1", "v2.0"), ("v2.0", "1.1"), ("v2.0", "")])
def test_a_folder_with_a_file_of_2_0_is_scored_by_its_rules(tmp_path, versions):
    for i, version in enumerate(versions):
        qas = [{"id": str(i), "question": "q", "answers": [{"text": "a", "answer_start": 0}]}]
        tree = {"version": version, "data": [{"title": "T", "paragraphs": [{"context": "a", "qas": qas}]}]}
        (tmp_path / f"{i}.json").write_text(json.dumps(tree))
    assert {e.version for e in load_squad(tmp_path)} == {"2.0"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            b"context,question,answer\nIn Paris, with Bo,Where?,Paris\n",
            r"a\.csv: row 1 has 4 cells for 3 columns: text with commas stands in quotes",
        ),
        ("a.csv", b"context,context,question,answer\na,b,q,a\n", r"a\.csv: has 2 columns called context"),
        ("a.csv", "context,question,answer\nCafé,q,Café\n".encode("latin-1"), r"no utf-8 text at byte 27; save it as"),
        (
            "a.csv",
            b"context,question,answer,answer_start\na,q,a,--1\n",
            r"answer_start: expected an integer, found str",
        ),
        ("a.csv", b"question,answers\nq,\n", r'row 1\.answers is null; no answer is "answers": \[\]'),
        (
            "a.csv",
            b"a,b\n1,2\n",
            r"a\.csv: its columns are 'a', 'b', expected id, title, context, question and answers",
        ),
        ("a.csv", b"question,answers\nq,\"{'text'\n", r"row 1\.answers: expected a list, found str"),
        ("a.json.gz", b"\x1f\x8b\x08\x00broken", r"a\.json\.gz: cannot be read"),
        ("a.json.gz", gzip.compress(b"[1" * 99, mtime=0)[:-9], r"a\.json\.gz: cannot be read"),
    ],
)
def test_a_wrong_table_or_archive_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_squad(tmp_path / name)
