"""The official metrics beside the algorithm of the official scripts, written out plainly."""

import random
import re
import string
from collections import Counter
from functools import partial
from typing import Any, get_args

from babl.data.fictional import SYLLABLES
from babl.evaluation.squad import Version
from babl.evaluation.squad import score as official_score
from babl.scripts.bench.turns import ratios, timed
from babl.text.normalize import normalize_answer


def add(jobs: Any) -> None:
    """Adds the job."""
    job = jobs.add_parser("score", help="the official metrics of predictions beside the official algorithm")
    job.add_argument("--questions", type=int, default=100_000, metavar="N")
    job.add_argument("--repeats", type=int, default=5, metavar="N")
    job.set_defaults(run=lambda a: score(a.questions, a.repeats))


def score(questions: int, repeats: int) -> list[dict[str, Any]]:
    """Returns a row for each version and kind of text: seconds of scoring, here and by the official scripts' algorithm.

    Raises:
        RuntimeError: A metric differs.
    """
    rows = []
    for version in get_args(Version):
        for texts in ("as in SQuAD", "none twice"):
            data, predictions = _annotated(questions, version, unique=texts == "none twice")
            runs = {
                "babl": partial(_fresh_score, data, predictions, version),
                "official algorithm": partial(_plain_score, data, predictions, version),
            }
            results = [run() for run in runs.values()]
            if results[0] != results[1]:
                raise RuntimeError(f"version {version}, {texts}: {results[0]} differs from {results[1]}")
            for row in ratios(timed(runs, repeats), "babl"):
                rows.append({"version": version, "texts": texts, "questions": questions} | row)
    return rows


def _fresh_score(data: dict[str, Any], predictions: dict[str, str], version: Version) -> dict[str, Any]:
    normalize_answer.cache_clear()  # as a new process begins
    return official_score(data, predictions, version=version)


def _annotated(questions: int, version: str, unique: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns a data set with one to five golds a question, and predictions: most right, some near, some wrong.

    Where `unique`, no text stands twice, though texts normalise to the same; in version 2.0 every second question has
    no answer.
    """
    rng = random.Random(0)
    words = ["of", "in", "the", "and", *map(str, range(1900, 1950))]
    words += ["".join(rng.choices(SYLLABLES, k=3)).capitalize() for _ in range(5000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    qas, predictions = [], {}
    for number in range(questions):
        right, wrong = (rng.choices(words, weights, k=rng.choice((1, 1, 2, 2, 3, 5))) for _ in range(2))
        mark = f" {number}" if unique else ""
        same = [form.format(" ".join(right) + mark) for form in ("{}", "the {}", "{}.", "({})", "{},", '"{}"')]
        near = " ".join(right[:2] + wrong[:1]) + mark + mark
        golds = rng.sample(same[:5], rng.randint(1, 5)) if unique else rng.choices([*same[:2], near], (8, 1, 1), k=3)
        predictions[str(number)] = rng.choices([same[5], near, " ".join(wrong) + mark * 3, ""], (14, 3, 2, 1))[0]
        if version == "2.0" and number % 2:
            golds = []
        qas.append({"id": str(number), "answers": [{"text": gold, "answer_start": 0} for gold in golds]})
    articles = [{"title": str(at), "paragraphs": [{"qas": qas[at : at + 200]}]} for at in range(0, questions, 200)]
    return {"version": version, "data": articles}, predictions


def _plain_score(dataset: dict[str, Any], predictions: dict[str, str], version: Version) -> dict[str, Any]:
    """Returns the metrics as the scripts published with SQuAD compute them, text by text, nothing kept."""
    exact, overlap, answerable = {}, {}, {}
    for article in dataset["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                golds = [answer["text"] for answer in qa["answers"]]
                answerable[qa["id"]] = bool(golds)
                if version == "2.0":
                    golds = [gold for gold in golds if _plain_normal(gold)] or [""]
                prediction = predictions[qa["id"]]
                exact[qa["id"]] = max(float(_plain_normal(gold) == _plain_normal(prediction)) for gold in golds)
                overlap[qa["id"]] = max(_plain_f1(gold, prediction, version) for gold in golds)

    def means(ids: list[str], prefix: str = "") -> dict[str, Any]:
        name = "exact_match" if version == "1.1" else f"{prefix}exact"
        return {
            name: 100.0 * sum(exact[i] for i in ids) / len(ids),
            f"{prefix}f1": 100.0 * sum(overlap[i] for i in ids) / len(ids),
            f"{prefix}total": len(ids),
        }

    if version == "1.1":
        return means(list(exact))
    has, has_not = ([i for i in exact if answerable[i] is wanted] for wanted in (True, False))
    return means(list(exact)) | means(has, "HasAns_") | means(has_not, "NoAns_")


def _plain_normal(text: str) -> str:
    punctuation = set(string.punctuation)
    bare = "".join(character for character in text.lower() if character not in punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _plain_f1(gold: str, prediction: str, version: str) -> float:
    golden, predicted = _plain_normal(gold).split(), _plain_normal(prediction).split()
    if version == "2.0" and not (golden and predicted):
        return float(golden == predicted)
    same = sum((Counter(golden) & Counter(predicted)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(golden)
    return 2 * precision * recall / (precision + recall)
