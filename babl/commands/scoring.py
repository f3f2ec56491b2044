"""The verbs that judge: `evaluate`, `score`, `compare` and `overlap`."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from babl.commands.options import (
    Verbs,
    add_chat_template,
    add_device,
    add_reading,
    add_verb,
    load_engine,
    print_facts,
    reading_config,
    warn,
)
from babl.errors import UserError

if TYPE_CHECKING:
    from babl.data.squad import Example
    from babl.evaluation.shots import Shots
    from babl.generation import Engine


def add_evaluate(verbs: Verbs) -> None:
    """Adds `babl evaluate`."""
    sub = add_verb(verbs, "evaluate", evaluate, "a model's answers to a data set, and their official scores")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("data", metavar="DATA.json")
    sub.add_argument(
        "--context", default="gold", metavar="ARM", help="what the model sees: gold (default), none, random ..."
    )
    sub.add_argument("--context-seed", type=int, default=0, metavar="N", help="of random contexts (default 0)")
    sub.add_argument("--out", type=Path, metavar="DIR", help="write predictions and metrics there; goes on if killed")
    sub.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
    sub.add_argument("--max-source-tokens", type=int, metavar="N", help="longest prompt (default 512, or what fits)")
    sub.add_argument("--stride", type=int, metavar="N", help="tokens neighbouring windows share (default a quarter)")
    sub.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    add_chat_template(sub)
    sub.add_argument("--shots", type=int, default=0, metavar="K", help="worked examples before each question")
    sub.add_argument("--shots-from", metavar="TRAIN.json", help="where they come from; articles of DATA are left out")
    sub.add_argument("--shots-seed", type=int, metavar="N", help="draw their articles (default: the first by name)")
    add_reading(sub, "strict", "faulty", "impossible", "articles")
    sub.add_argument(
        "--overlong",
        choices=("drop", "error"),
        default="drop",
        help="a question too long to be asked counts as answered with nothing (default), or is an error",
    )
    add_device(sub)
    sub.add_argument("--json", action="store_true")


def evaluate(args: argparse.Namespace) -> None:
    """Prints the metrics of a model on a data set."""
    from babl.data.contexts import TEST_ARMS
    from babl.data.squad import load_squad
    from babl.errors import did_you_mean
    from babl.evaluation.predictions import PromptLimits
    from babl.evaluation.runner import evaluate as run
    from babl.evaluation.runner import longest_prompt
    from babl.generation.conversation import prompt_style
    from babl.text.prompts import system_message

    if args.context not in TEST_ARMS:
        near = did_you_mean(args.context, TEST_ARMS)
        raise UserError(f"--context is {args.context!r}, expected one of {', '.join(TEST_ARMS)}{near}")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}, expected at least 1")
    told: list[str] = []
    examples = load_squad(args.data, reading_config(args), told.append)[: args.limit]
    engine = load_engine(args)
    before = system_message(args.system)
    prompt_style(engine, args.chat, before)  # before the work, not in the midst of it
    if args.out:  # before the work, not after it
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: {args.out} cannot be written ({error.strerror})") from None
    print(*told, sep="\n", file=sys.stderr)
    longest = args.max_source_tokens
    longest = longest_prompt(engine, args.max_new_tokens) if longest is None else longest
    stride = longest // 4 if args.stride is None else args.stride
    unanswerable = examples[0].version == "2.0"
    shots = _shots(args, engine, examples, longest)
    if shots:
        before, longest = shots.before, longest + shots.tokens
    limits = PromptLimits(longest, stride, args.max_new_tokens, unanswerable, args.chat, before)
    result = run(engine, examples, args.context, limits, args.context_seed, Path(args.model), args.out, args.overlong)
    if shots:
        result.metrics |= shots.facts(result.questions)
    if too_long := result.metrics["overlong"]:
        print(
            f"{too_long:,} of {len(result.predictions):,} questions leave no room for their context in {longest} "
            "tokens: they count as answered with nothing (--overlong error refuses them)",
            file=sys.stderr,
        )
    if args.out:
        result.save(args.out)
    print_facts(result.metrics, args.json)


def _shots(args: argparse.Namespace, engine: "Engine", examples: "list[Example]", longest: int) -> "Shots | None":
    """Returns the worked examples that are asked for, and says which are not shown; None where none are."""
    from babl.data.contexts import build_views
    from babl.data.squad import load_squad
    from babl.evaluation.shots import draw_shots, show_shots
    from babl.generation.conversation import prompt_style
    from babl.text.prompts import system_message

    if args.shots < 0:
        raise UserError(f"--shots is {args.shots}, expected 0 or more")
    if not args.shots:
        if args.shots_from or args.shots_seed is not None:
            raise UserError("--shots-from and --shots-seed are for worked examples; say how many with --shots")
        return None
    if not args.shots_from:
        raise UserError("--shots needs the file that the examples come from: --shots-from TRAIN.json")
    train = load_squad(args.shots_from, reading_config(args), warn)
    limit = engine.prompt_limit(args.max_new_tokens)
    room = None if limit is None else limit - longest
    drawn = draw_shots(train, examples, args.shots, args.shots_seed)
    views, missing = build_views(train, args.context, args.context_seed, spans=True)
    style = prompt_style(engine, args.chat)
    shots = show_shots(drawn, views, missing, system_message(args.system), engine.tokenizer, style, room)
    prompt_style(engine, args.chat, shots.before)
    for line in shots.left_out:
        warn(f"--shots: {line}")
    return shots


def add_score(verbs: Verbs) -> None:
    """Adds `babl score`."""
    sub = add_verb(verbs, "score", score, "the official SQuAD metrics of a prediction file")
    sub.add_argument("data", metavar="DATA.json")
    sub.add_argument("predictions", metavar="PREDICTIONS.json")
    sub.add_argument("--na-prob", metavar="FILE", help="question id -> probability of no answer (version 2.0)")
    sub.add_argument("--na-threshold", type=float, default=1.0, metavar="T", help="abstain above it (default 1.0)")
    sub.add_argument("--missing", choices=("error", "zero"), default="error", help="questions without a prediction")
    sub.add_argument(
        "--f1-characters",
        action="store_true",
        help="also the F1 over characters, for languages without spaces (not an official metric)",
    )
    add_reading(sub, "faulty")
    sub.add_argument("--json", action="store_true", help="(the output is JSON in any case)")


def score(args: argparse.Namespace) -> None:
    """Prints the official metrics as JSON."""
    from babl.data.squad import load_golds, to_squad
    from babl.evaluation.squad import read_by_id
    from babl.evaluation.squad import score as official

    dataset = to_squad(load_golds(args.data, reading_config(args), warn))
    na_prob = read_by_id(args.na_prob) if args.na_prob else None
    predictions = read_by_id(args.predictions)
    metrics = official(dataset, predictions, na_prob, args.na_threshold, missing=args.missing)
    if args.f1_characters:
        from babl.evaluation.characters import f1_characters

        metrics["f1_characters"] = f1_characters(dataset, predictions)
    print(json.dumps(metrics, indent=2))


def add_compare(verbs: Verbs) -> None:
    """Adds `babl compare`."""
    sub = add_verb(verbs, "compare", compare, "two prediction files on the same questions: the paired difference B - A")
    sub.add_argument("data", metavar="DATA.json")
    sub.add_argument("a", metavar="A.json")
    sub.add_argument("b", metavar="B.json")
    sub.add_argument("--common", action="store_true", help="only the questions that both files have; the rest counted")
    sub.add_argument(
        "--data-b",
        metavar="DATA.json",
        help="B's questions, where its arm rewrote them: the questions.json that `evaluate --out` writes",
    )
    add_reading(sub, "faulty", "articles")
    sub.add_argument("--json", action="store_true")


def compare(args: argparse.Namespace) -> None:
    """Prints how two prediction files differ, and how sure that is."""
    from babl.data.squad import load_golds
    from babl.evaluation.compare import Side, describe
    from babl.evaluation.compare import compare as paired
    from babl.evaluation.squad import read_by_id

    data = load_golds(args.data, reading_config(args), warn)
    a = Side(args.a, data, read_by_id(args.a))
    b = Side(args.b, load_golds(args.data_b, reading_config(args), warn) if args.data_b else data, read_by_id(args.b))
    found = paired(a, b, args.common)
    print(json.dumps(found, indent=2, ensure_ascii=False) if args.json else describe(found))


def add_overlap(verbs: Verbs) -> None:
    """Adds `babl overlap`."""
    sub = add_verb(verbs, "overlap", overlap, "what a test set shares with a training set and, if given, a corpus")
    sub.add_argument("train", metavar="TRAIN.json")
    sub.add_argument("test", metavar="DEV.json")
    sub.add_argument(
        "--corpus",
        type=Path,
        nargs="+",
        default=[],
        metavar="SHARD",
        help="a document a line: .txt, .jsonl (or .json), or .gz of it",
    )
    add_reading(sub, "strict", "faulty", "impossible", "articles")
    sub.add_argument("--out", type=Path, metavar="DIR", help="write overlap.json, overlap.md, questions.jsonl there")
    sub.add_argument("--json", action="store_true")


def overlap(args: argparse.Namespace) -> None:
    """Prints the contamination report."""
    from babl.data.corpus import corpus_overlap, read_documents
    from babl.data.overlap import find_overlap
    from babl.data.overlap_report import markdown, report, save
    from babl.data.squad import load_squad

    if args.out:  # before the work, not after it
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: {args.out} cannot be written ({error.strerror})") from None
    documents = read_documents(args.corpus)
    told: list[str] = []
    train, test = (load_squad(path, reading_config(args), told.append) for path in (args.train, args.test))
    found = find_overlap(train, test)
    corpus = corpus_overlap(test, documents) if args.corpus else None
    print(*told, sep="\n", file=sys.stderr)
    if args.out:
        save(found, corpus, args.out)
    if args.json:
        print(json.dumps(report(found, corpus), indent=2))
    else:
        print(markdown(found, corpus), end="")
