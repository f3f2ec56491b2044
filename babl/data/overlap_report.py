"""The contamination report: for programs, for people, and question by question."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from babl.data.corpus import LLAMA_CLEAN, LLAMA_DIRTY, PALM_DIRTY, CorpusOverlap
from babl.data.overlap import CONTAINED, DECLARED, LOOSE, OVERLAP_BIASES, STRICT, Overlap, QuestionOverlap

PAIRS = 20  # of questions shown


def report(overlap: Overlap, corpus: CorpusOverlap | None = None) -> dict[str, Any]:
    """Returns all there is to tell but the single questions, as JSON takes it."""
    measured = {"corpus": corpus.summary} if corpus else {}
    return overlap.summary | measured | {"declared": [asdict(d) for d in DECLARED], "biases": list(OVERLAP_BIASES)}


def markdown(overlap: Overlap, corpus: CorpusOverlap | None = None) -> str:
    """Returns the same for people, with the pairs of questions they should read."""
    s = overlap.summary
    total = s["test"]["questions"]
    equal = {"articles": len(s["titles"]), "contexts": s["contexts"]["equal"], "questions": s["questions"]["equal"]}
    parts = [
        "# Overlap",
        _table(
            ("", "train", "test", "of test also in train"),
            [(name, s["train"][name], s["test"][name], count) for name, count in equal.items()],
        ),
        "Contexts of test, by the share of their n-grams that stands in one context of train:",
        _table(
            ("n-grams of", *(f"at least {share}" for share in CONTAINED)),
            [(f"{n} words", *counts.values()) for n, counts in s["contexts"]["near"].items()],
        ),
        "Questions of test, by what train has (a paraphrase has a Jaccard index or a TF-IDF cosine of at least "
        f"{STRICT[0]} or {STRICT[1]}; loosely, {LOOSE[0]} or {LOOSE[1]}):",
        _table(
            ("threshold", "the question", "only its answer", "neither"),
            [(name, *(_share(n, total) for n in counts.values())) for name, counts in s["classes"].items()],
        ),
        f"Of {s['questions']['equal']} equal questions, {s['questions']['equal_same_answer']} have the same answer; of "
        f"{s['questions']['paraphrased']} paraphrased ones, {s['questions']['paraphrased_same_answer']}.",
        "Answers of test that are an answer of train:",
        _table(
            ("kind", "questions", "known"),
            [(kind, n["questions"], _share(n["known"], n["questions"])) for kind, n in s["answers"].items()],
        ),
        f"Some context of train has the answer and a rare name of the question for {_share(s['told'], total)} of them.",
    ]
    if corpus:
        parts += ["## In the corpus", *_corpus(corpus)]
    near = [q for q in overlap.questions.values() if q.loose == "question" and not q.question_equal]
    if near:
        shown = f"The {min(PAIRS, len(near))} nearest of {len(near)} that are not equal; questions.jsonl has all."
        parts += ["## Questions to read", shown, _pairs(near)]
    parts += [
        "## What pre-training saw, as declared",
        _table(("checkpoints", "saw", "which raises", "source"), [tuple(asdict(d).values()) for d in DECLARED]),
        "## What overlap does to the comparison",
        "\n".join(f"- {bias}" for bias in OVERLAP_BIASES),
    ]
    return "\n\n".join(parts) + "\n"


def _corpus(corpus: CorpusOverlap) -> list[str]:
    fields = corpus.summary["fields"]
    rows = []
    for field, s in fields.items():
        gpt3, palm, llama2, longest = s["gpt3"], s["palm"], s["llama2"], s["longest"]
        rows.append(
            (
                field,
                f"{_share(gpt3['dirty'], gpt3['measured'])} (n = {gpt3['n']})",
                _share(palm["dirty"], palm["measured"]),
                _share(llama2["clean"], llama2["measured"]),
                _share(llama2["dirty"], llama2["measured"]),
                f"{longest['median']:g} / {longest['max']}",
                _share(longest["whole"], s["questions"]),
            )
        )
    return [
        f"{corpus.documents:,} documents. Shares are of the questions whose field is long enough for the score: any "
        f"n-gram (GPT-3); at least {PALM_DIRTY} of the 8-grams (PaLM); below {LLAMA_CLEAN} and from {LLAMA_DIRTY} of "
        "the words inside long matches (Llama 2); the longest run of words.",
        _table(
            ("field", "GPT-3 dirty", "PaLM dirty", "Llama 2 clean", "Llama 2 dirty", "longest: median / most", "whole"),
            rows,
        ),
    ]


def _pairs(near: list[QuestionOverlap]) -> str:
    near = sorted(near, key=lambda q: -max(q.jaccard / STRICT[0], q.cosine / STRICT[1]))
    rows = [
        (q.question, q.nearest_question, f"{q.jaccard:.2f}", f"{q.cosine:.2f}", "yes" if q.same_answer else "no")
        for q in near[:PAIRS]
    ]
    return _table(("of test", "nearest of train", "Jaccard", "cosine", "same answer"), rows)


def save(overlap: Overlap, corpus: CorpusOverlap | None, folder: Path) -> None:
    """The folder holds overlap.json, overlap.md and questions.jsonl, a line for each test question."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report(overlap, corpus), indent=2, ensure_ascii=False) + "\n"
    (folder / "overlap.json").write_text(text, encoding="utf-8")
    (folder / "overlap.md").write_text(markdown(overlap, corpus), encoding="utf-8")
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for qid, question in overlap.questions.items():
            row: dict[str, Any] = {"id": qid} | asdict(question)
            if corpus:
                row["corpus"] = {field: asdict(found[qid]) for field, found in corpus.exposures.items() if qid in found}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / whole:.1f} %)" if whole else "none"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else " ".join(str(value).replace("|", "/").split())
