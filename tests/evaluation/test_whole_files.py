"""Whole files, spoilt in the ways that files are: they score as the clean ones do, train, and say what was spoilt.

The scores come from a statement of the official scripts' algorithm in this file, run on the clean data. What a file is
to say of its answers is counted while it is spoilt.
"""

import copy
import csv
import gzip
import io
import json
import random
import re
import string
import unicodedata
from collections import Counter

import pytest

from babl.cli import main
from babl.data.squad import load_squad

WORDS = (
    *(
        "Ada",
        "Köln",
        "née",
        "1840",
        "river",
        "Jose\u0301",
        "the",
        "old",
        "Öde",
        "mill",
        "Ångström",
        "built",
        "of",
        "in",
    ),
    *("São", "Paulo’s", "12", "km", "Ilm's,", "naïve", "ﬁne", "(town)."),
)
REAL = {"dev-v1.1-xquad-en": 1190, "dev-v2.0-slice": 418, "train-v1.1-slice": 4370}


def made(seed):
    """Articles of made-up sentences; one question in six has no answer, the others two or three."""
    rng, articles = random.Random(seed), []
    for a in range(6):
        paragraphs = []
        for p in range(2):
            context, qas = " ".join(rng.choices(WORDS, k=40)), []
            for q in range(5):
                spans = [match.span() for match in re.finditer(r"\S+", context)]
                answers = []
                for _ in range(rng.choice((0, 2, 2, 2, 3, 3))):
                    first = rng.randrange(len(spans) - 3)
                    start, end = spans[first][0], spans[first + rng.randrange(3)][1]
                    answers.append({"text": context[start:end], "answer_start": start})
                qas.append({"id": f"{a}-{p}-{q}", "question": f"What {q}?", "answers": answers})
            paragraphs.append({"context": context, "qas": qas})
        articles.append({"title": f"Article {a}", "paragraphs": paragraphs})
    return {"version": "v2.0", "data": articles}


def questions(tree):
    for article in tree["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                yield article, paragraph, qa


def guesses(tree, seed):
    """Predictions of every quality."""
    rng, found = random.Random(seed), {}
    for _, paragraph, qa in questions(tree):
        text = (
            rng.choice(qa["answers"])["text"]
            if qa["answers"] and rng.random() < 0.8
            else rng.choice(["", "The", "x y"])
        )
        words = text.split() + rng.choices(paragraph["context"].split(), k=rng.choice((0, 0, 1, 3)))
        rng.shuffle(words) if rng.random() < 0.3 else None
        found[qa["id"]] = rng.choice((str, str.upper, lambda t: f"the {t}!"))(" ".join(words))
    return found


# ---- the official scripts, in words of this file's own


def normal(text):
    bare = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def overlap(prediction, gold, empty_scores):
    predicted, wanted = normal(prediction).split(), normal(gold).split()
    if empty_scores and not (predicted and wanted):
        return float(predicted == wanted)
    common = sum((Counter(predicted) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def official(tree, predictions):
    second = tree["version"] == "v2.0"
    exact, f1 = [], []
    for _, _, qa in questions(tree):
        golds = [answer["text"] for answer in qa["answers"]]
        if second:
            golds = [gold for gold in golds if normal(gold)] or [""]
        prediction = predictions[qa["id"]]
        exact.append(max(float(normal(prediction) == normal(gold)) for gold in golds))
        f1.append(max(overlap(prediction, gold, second) for gold in golds))
    totals = (100.0 * sum(exact) / len(exact), 100.0 * sum(f1) / len(f1), len(exact))
    return dict(zip(("exact" if second else "exact_match", "f1", "total"), totals, strict=True))


# ---- ways to spoil a tree; each returns how many answers then stand in which way


def canonical(text):
    return unicodedata.normalize("NFKD", " ".join(text.split()))


def stands(paragraph, answer):
    return paragraph["context"].startswith(answer["text"], answer["answer_start"])


def whitespace(tree, rng):
    """Two spaces, or a line's end, where the context has one space."""
    spoilt = 0
    for _, paragraph, qa in questions(tree):
        for answer in qa["answers"]:
            if " " in answer["text"] and stands(paragraph, answer) and rng.random() < 0.4:
                answer["text"] = answer["text"].replace(" ", rng.choice(("  ", "\n", " \t")), 1)
                spoilt += 1
    return {"whitespace": spoilt}


def moved(tree, rng):
    spoilt = 0
    for _, paragraph, qa in questions(tree):
        for answer in qa["answers"]:
            start = max(answer["answer_start"] + rng.choice((-7, -2, -1, 1, 3, 20)), 0)
            there = paragraph["context"][start:]
            if (
                stands(paragraph, answer)
                and rng.random() < 0.3
                and not canonical(there).startswith(canonical(answer["text"]))
            ):
                answer["answer_start"] = start
                spoilt += 1
    return {"moved": spoilt}


def unfound(tree, rng):
    """A further gold, which no context holds and no prediction shares a word with."""
    spoilt = 0
    for _, _, qa in questions(tree):
        if qa["answers"] and rng.random() < 0.2:
            qa["answers"].append({"text": "Qzxq Wkjq", "answer_start": rng.randrange(50)})
            spoilt += 1
    return {"not found": spoilt}


def in_form(form):
    def spoil(tree, rng):
        """The contexts in this Unicode form, offsets moved with them; gold texts stay as they are."""
        spoilt = 0
        for article in tree["data"]:
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                paragraph["context"] = unicodedata.normalize(form, context)
                for answer in (answer for qa in paragraph["qas"] for answer in qa["answers"]):
                    answer["answer_start"] = len(unicodedata.normalize(form, context[: answer["answer_start"]]))
                    spoilt += not stands(paragraph, answer)
        return {"whitespace": spoilt}

    return spoil


def integer_ids(tree, rng):
    for number, (_, _, qa) in enumerate(questions(tree)):
        qa["id"] = number
    return {}


def without_titles(tree, rng):
    for article in tree["data"]:
        article.pop("title", None)
    return {}


def everything(tree, rng):
    """One thing after the other, to each answer one at most."""
    counts = Counter()
    for spoil in (in_form("NFD"), whitespace, moved, unfound, integer_ids, without_titles):
        counts.update(spoil(tree, rng))
    return counts


SPOILS = {
    "whitespace": whitespace,
    "moved": moved,
    "not found": unfound,
    "NFD": in_form("NFD"),
    "NFC": in_form("NFC"),
    "NFKC": in_form("NFKC"),
    "integer ids": integer_ids,
    "no titles": without_titles,
}


# ---- shapes


def flat(tree):
    rows = []
    for article, paragraph, qa in questions(tree):
        answers = {key: [answer[key] for answer in qa["answers"]] for key in ("text", "answer_start")}
        title = {"title": article["title"]} if "title" in article else {}
        rows.append(
            {"id": qa["id"], **title, "context": paragraph["context"], "question": qa["question"], "answers": answers}
        )
    return rows


def as_csv(tree):
    stream, rows = io.StringIO(), flat(tree)
    writer = csv.DictWriter(stream, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def as_parquet(tree):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    stream = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(flat(tree)), stream)
    return stream.getvalue()


SHAPES = {
    "a.json": lambda tree: json.dumps(tree).encode(),
    "a.json.gz": lambda tree: gzip.compress(json.dumps(tree, indent=1).encode()),
    "a.jsonl": lambda tree: ("\ufeff" + "\r\n".join(map(json.dumps, flat(tree)))).encode(),
    "array.json": lambda tree: json.dumps(flat(tree), ensure_ascii=False).encode(),
    "a.csv": as_csv,
    "a.parquet": as_parquet,
}


def check(clean, spoil, shape, folder, capsys, seed):
    """The spoilt file scores as the official algorithm scores the clean one, and says how it was spoilt."""
    tree, predictions = copy.deepcopy(clean), guesses(clean, seed)
    counts = Counter(spoil(tree, random.Random(seed)))
    ids = {old["id"]: str(new["id"]) for (*_, old), (*_, new) in zip(questions(clean), questions(tree), strict=True)}
    path, answers = folder / shape, folder / "predictions.json"
    path.write_bytes(SHAPES[shape](tree))
    answers.write_text(json.dumps({ids[qid]: text for qid, text in predictions.items()}))
    assert main(["score", str(path), str(answers)]) == 0
    scores, expected = json.loads(capsys.readouterr().out), official(clean, predictions)
    if shape not in ("a.json", "a.json.gz") and "exact" in expected and "exact_match" in scores:
        expected["exact_match"] = expected.pop("exact")  # rows say no version
    assert {key: scores[key] for key in expected} == expected
    total = sum(len(qa["answers"]) for *_, qa in questions(tree))
    counts["exact"] = total - counts.total()
    told = []
    load_squad(path, tell=told.append)
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in ("exact", "whitespace", "moved", "not found"))
    assert told == [f"{path}: {len(predictions)} questions, {total} answers: {kinds}"]
    return path, counts


@pytest.mark.parametrize("name", SPOILS)
def test_a_spoilt_file_scores_as_the_clean_one_and_says_what_was_spoilt(name, tmp_path, capsys):
    _, counts = check(made(1), SPOILS[name], "a.json", tmp_path, capsys, seed=1)
    assert counts.total() - counts["exact"] > 5 or name in ("integer ids", "no titles")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_file_spoilt_in_every_way_scores_the_same(shape, tmp_path, capsys):
    _, counts = check(made(2), everything, shape, tmp_path, capsys, seed=2)
    assert min(counts[kind] for kind in ("exact", "whitespace", "moved", "not found")) > 5


def real(shared, name):
    return json.loads((shared / "data" / "squad" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("file", REAL)
@pytest.mark.parametrize("name", SPOILS)
def test_a_real_file_spoilt_in_one_way(file, name, shared, tmp_path, capsys):
    check(real(shared, file), SPOILS[name], "a.json", tmp_path, capsys, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("file", REAL)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_real_file_spoilt_in_every_way_in_every_shape(file, shape, shared, tmp_path, capsys):
    _, counts = check(real(shared, file), everything, shape, tmp_path, capsys, seed=4)
    assert min(counts[kind] for kind in ("exact", "whitespace", "moved", "not found")) > 20


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_a_real_file_spoilt_in_every_way_trains_and_is_evaluated(shape, shared, tmp_path, capsys, runs):
    path, counts = check(real(shared, "dev-v1.1-xquad-en"), everything, shape, tmp_path, capsys, seed=5)
    window = ("data.max_source_tokens=512", "batch.tokens=8000")
    output = runs.run("spoilt", f"data.train={path}", "train.steps=2", *window, ranks=1)
    assert f"answers: {counts['exact']} exact, {counts['whitespace']} whitespace, {counts['moved']} moved" in output
    model = runs.folder / "spoilt" / "checkpoints" / "latest"
    assert main(["evaluate", str(model), str(path), "--limit", "12", "--max-new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == 12
