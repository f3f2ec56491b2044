"""The `babl` command: thin verbs, each of which imports what it needs when it is called."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from babl import __version__
from babl.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns 0, 1 where a run failed, or 2 where the input was wrong."""
    arguments = sys.argv[1:] if argv is None else argv
    strange = next((each for each in arguments if any("\ud800" <= c <= "\udfff" for c in each)), None)
    if strange is not None:  # bytes that are no text stand in an argument as surrogates, which no tokenizer takes
        print(f"babl: the argument {strange!r} has bytes that are not UTF-8", file=sys.stderr)
        return 2
    args, rest = _parser().parse_known_args(arguments)
    if rest and (args.verb not in ("train", "experiment") or any("=" not in each for each in rest)):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    try:
        if "kernels" in args:
            from babl import ops

            ops.use_kernels(args.kernels)
        return args.run(args) or 0
    except UserError as error:
        if args.debug:
            raise
        print(f"babl {args.verb}: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # a model whose logits are no numbers
        if args.debug:
            raise
        print(f"babl {args.verb}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print(f"babl {args.verb}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="babl",
        description="Fine-tune T5, LLaMA and BLOOM with a loop you can read, and measure whether context helps.",
    )
    parser.add_argument("--version", action="version", version=f"babl {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user error")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], Any], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = verb("demo", demo, "embedded data: a model with and one without the context, compared in a report")
    sub.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default runs/demo")
    sub.add_argument("--family", choices=("t5", "llama", "bloom"), default="t5")
    sub.add_argument("--minutes", type=float, default=6.0, help="about how long all of it may take (default 6)")
    sub.add_argument("--seed", type=int, default=0)

    sub = verb("train", train, "train as the configuration says")
    sub.add_argument("config", metavar="CONFIG.toml")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value")
    _add_kernels(sub)

    sub = verb("evaluate", evaluate, "a model's answers to a data set, and their official scores")
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
    _add_chat(sub)
    _add_reading(sub, "strict", "faulty", "impossible", "articles")
    sub.add_argument(
        "--overlong",
        choices=("drop", "error"),
        default="drop",
        help="a question too long to be asked counts as answered with nothing (default), or is an error",
    )
    _add_device(sub)
    sub.add_argument("--json", action="store_true")

    sub = verb("score", score, "the official SQuAD metrics of a prediction file")
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
    _add_reading(sub, "faulty")
    sub.add_argument("--json", action="store_true", help="(the output is JSON in any case)")

    sub = verb("compare", compare, "two prediction files on the same questions: the paired difference B - A")
    sub.add_argument("data", metavar="DATA.json")
    sub.add_argument("a", metavar="A.json")
    sub.add_argument("b", metavar="B.json")
    sub.add_argument("--common", action="store_true", help="only the questions that both files have; the rest counted")
    sub.add_argument(
        "--data-b",
        metavar="DATA.json",
        help="B's questions, where its arm rewrote them: the questions.json that `evaluate --out` writes",
    )
    _add_reading(sub, "faulty", "articles")
    sub.add_argument("--json", action="store_true")

    sub = verb("overlap", overlap, "what a test set shares with a training set and, if given, a corpus")
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
    _add_reading(sub, "strict", "faulty", "impossible", "articles")
    sub.add_argument("--out", type=Path, metavar="DIR", help="write overlap.json, overlap.md, questions.jsonl there")
    sub.add_argument("--json", action="store_true")

    sub = verb("query", query, "one answer")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("question", metavar="QUESTION")
    context = sub.add_mutually_exclusive_group()
    context.add_argument("--context", metavar="TEXT")
    context.add_argument("--context-file", type=Path, metavar="FILE")
    sub.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    _add_chat(sub)
    _add_device(sub)
    sub.add_argument("--json", action="store_true")

    sub = verb("generate", generate, "the raw continuation of a prompt, as it is written")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("prompt", metavar="PROMPT", help="may be empty: a text from nothing")
    _add_chat(sub)
    _add_sampling(sub, temperature=0.0)
    sub.add_argument("--num-beams", type=int, default=1, metavar="N", help="above 1, beam search")
    sub.add_argument("--length-penalty", type=float, default=1.0, metavar="A", help="of beams (default 1)")
    _add_device(sub)
    sub.add_argument("--json", action="store_true")

    sub = verb("chat", chat, "talk to a model in the terminal")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--resume", metavar="ID", help="go on with a conversation")
    sub.add_argument("--system", default="", metavar="TEXT", help="what a chat model is told first")
    _add_sampling(sub, temperature=0.7)
    _add_device(sub)

    sub = verb("serve", serve, "talk to the models in the browser")
    sub.add_argument("--models", type=Path, action="append", default=[], metavar="DIR", help="default models and runs")
    sub.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1; another one needs BABL_AUTH=login")
    sub.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000; 0 takes a free one")
    sub.add_argument("--data", type=Path, metavar="DIR", help="of the database; default BABL_HOME, else ~/.babl")
    sub.add_argument("--add-user", metavar="NAME", help="let NAME log in with a password it asks for, and end")

    sub = verb("feedback", feedback, "what people said of answers in the browser, as questions to train on")
    sub.add_argument("action", choices=("export",))
    sub.add_argument("out", type=Path, metavar="OUT.json")
    sub.add_argument(
        "--test-share", type=float, default=0.0, metavar="P", help="keep this share of the passages for OUT-test.json"
    )
    sub.add_argument("--data", type=Path, metavar="DIR", help="as of `babl serve`")
    sub.add_argument("--json", action="store_true")

    sub = verb("models", models, "the model folders here, and which of them fit this machine")
    sub.add_argument("--models", type=Path, default=Path("models"), metavar="DIR", help="default models")
    _add_need(sub)

    sub = verb("pull", pull, "fetch a model folder from the Hugging Face hub (HF_ENDPOINT, HF_TOKEN)")
    sub.add_argument("repo_id", metavar="REPO_ID")
    sub.add_argument("--to", type=Path, metavar="DIR", help="default models/NAME")
    sub.add_argument("--revision", default="main", metavar="REV", help="branch, tag or commit (default main)")
    sub.add_argument("--pickles", action="store_true", help="where it has no safetensors: the pickles, to be converted")

    sub = verb("convert", convert, "pickled weights to safetensors, read in a process that can do nothing else")
    sub.add_argument("folder", type=Path, metavar="FOLDER", help="with pytorch_model.bin, or its shards")
    sub.add_argument("--to", type=Path, metavar="DIR", help="a new folder; default FOLDER itself, beside the pickles")

    sub = verb("export", export, "a checkpoint's model alone: weights, config and tokenizer")
    sub.add_argument("checkpoint", metavar="CHECKPOINT")
    sub.add_argument("to", type=Path, metavar="DIR")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")

    sub = verb("info", info, "what a model folder or checkpoint holds, and whether it is whole")
    sub.add_argument("model", metavar="MODEL")
    _add_need(sub)

    sub = verb(
        "experiment", experiment, "a frozen grid of models, trained, tested and compared: does the context help?"
    )
    sub.add_argument("action", choices=("run", "report", "verify"), help="verify: is everything what was computed?")
    sub.add_argument("config", metavar="CONFIG.toml")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value")
    sub.add_argument("--dry-run", action="store_true", help="print cells, work, time, disk and power; train nothing")
    sub.add_argument("--only", metavar="CELL", help="one cell, by id or number, and no report")
    sub.add_argument("--jobs", type=int, metavar="N", help="cells at once (default one a CPU, or one with a GPU)")
    sub.add_argument(
        "--limit-minutes", type=float, metavar="M", help="then leave with exit code 75; run it again to go on"
    )

    sub = verb("verify", verify, "prove that a training script, edited or not, still does what it should")
    sub.add_argument("script", nargs="?", type=Path, metavar="SCRIPT", help="default Babl's own loop")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="given to the script")
    sub.add_argument("--self", action="store_true", dest="itself", help="against itself: any loss, any optimizer")
    sub.add_argument("--fixed", action="append", default=[], metavar="PATTERN", help="these parameters do not move")
    sub.add_argument(
        "--rate",
        action="append",
        default=[],
        metavar="PATTERN=FACTOR",
        help="their share of the learning rate",
    )
    sub.add_argument("--base", type=Path, metavar="SCRIPT", help="the loop without the rates of --rate (with --self)")
    sub.add_argument(
        "--ignore", action="append", default=[], metavar="KEY", help="a logged number that depends on splits"
    )
    sub.add_argument("--family", choices=("t5", "llama", "bloom"), help="run the script with this one alone")
    sub.add_argument("--quick", action="store_true", help="plain DDP alone, on one rank and on two")
    sub.add_argument("--json", action="store_true")

    sub = verb("doctor", doctor, "what this machine can run, and what is missing")
    sub.add_argument("--json", action="store_true")
    return parser


def _add_sampling(sub: argparse.ArgumentParser, temperature: float) -> None:
    sub.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    sub.add_argument("--temperature", type=float, default=temperature, metavar="T", help=f"default {temperature}")
    sub.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest (0: all)")
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest that sum to P")
    sub.add_argument("--min-p", type=float, default=0.0, metavar="P", help="share of the likeliest's probability")
    sub.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this; may be repeated")
    sub.add_argument("--seed", type=int, default=0)


def _add_chat(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    sub.add_argument("--system", default="", metavar="TEXT", help="with --chat: the system message")


def _add_device(sub: argparse.ArgumentParser) -> None:
    _add_placement(sub)
    _add_kernels(sub)


def _add_need(sub: argparse.ArgumentParser) -> None:
    _add_placement(sub)
    sub.add_argument("--context", type=int, metavar="N", help="tokens there must be memory for (default the model's)")
    sub.add_argument("--json", action="store_true")


def _add_placement(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    sub.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")


def _add_kernels(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--kernels", metavar="auto|on|off", help="Triton: where measured faster, wherever possible, never")


def _add_reading(sub: argparse.ArgumentParser, *names: str) -> None:
    """Adds options of `Reading`, which a configuration has as data.NAME."""
    options: dict[str, dict[str, Any]] = {
        "faulty": {"choices": ("refuse", "leave-out"), "help": "records that cannot be read (default refuse)"},
        "strict": {"action": "store_true", "help": "refuse answers that do not stand at their offsets"},
        "impossible": {"choices": ("refuse", "unanswerable"), "help": "answers beside is_impossible: true"},
        "articles": {"choices": ("title", "context"), "help": "what questions of one article share (default title)"},
    }
    for name in names:
        sub.add_argument(f"--{name}", default=argparse.SUPPRESS, **options[name])


def _reading(args: argparse.Namespace) -> Any:
    """Returns the Reading that the options of `_add_reading` ask for."""
    from dataclasses import fields

    from babl.data.squad import Reading

    given = vars(args)
    return Reading(**{field.name: given[field.name] for field in fields(Reading) if field.name in given})


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def _engine(args: argparse.Namespace) -> Any:
    """Returns the engine of the model asked for, and says what of its generation_config.json is not used."""
    from babl.generation import Engine
    from babl.generation.published import unused_settings

    engine = Engine.load(args.model, args.device, args.dtype)
    if unused := unused_settings(args.model):
        _tell(unused)
    return engine


def _sampling(args: argparse.Namespace, **more: Any) -> Any:
    """Returns the GenerationConfig that the options of `_add_sampling` ask for."""
    from babl.generation import GenerationConfig

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return GenerationConfig(**{name: getattr(args, name) for name in names}, stop_strings=tuple(args.stop), **more)


def demo(args: argparse.Namespace) -> int:
    """Runs scripts/demo.py."""
    from babl.scripts.demo import run

    return run(args.out, args.family, args.minutes, args.seed)


def train(args: argparse.Namespace) -> int:
    """Runs scripts/train.py."""
    from babl.scripts.train import main as train_main

    return train_main([args.config, *args.overrides])


def evaluate(args: argparse.Namespace) -> None:
    """Prints the metrics of a model on a data set."""
    from babl.data.contexts import TEST_ARMS
    from babl.data.squad import load_squad
    from babl.errors import did_you_mean
    from babl.evaluation.predictions import Asking
    from babl.evaluation.runner import evaluate as run
    from babl.evaluation.runner import longest_prompt
    from babl.generation.conversation import prompt_style

    if args.context not in TEST_ARMS:
        near = did_you_mean(args.context, TEST_ARMS)
        raise UserError(f"--context is {args.context!r}, expected one of {', '.join(TEST_ARMS)}{near}")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}, expected at least 1")
    told: list[str] = []
    examples = load_squad(args.data, _reading(args), told.append)[: args.limit]
    engine = _engine(args)
    prompt_style(engine, args.chat, args.system)  # before the work, not in the midst of it
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
    asking = Asking(longest, stride, args.max_new_tokens, unanswerable, args.chat, args.system)
    result = run(engine, examples, args.context, asking, args.context_seed, Path(args.model), args.out, args.overlong)
    if too_long := result.metrics["overlong"]:
        print(
            f"{too_long:,} of {len(result.predictions):,} questions leave no room for their context in {longest} "
            "tokens: they count as answered with nothing (--overlong error refuses them)",
            file=sys.stderr,
        )
    if args.out:
        result.save(args.out)
    _show(result.metrics, args.json)


def score(args: argparse.Namespace) -> None:
    """Prints the official metrics as JSON."""
    from babl.data.squad import load_golds, to_squad
    from babl.evaluation.squad import read_by_id
    from babl.evaluation.squad import score as official

    dataset = to_squad(load_golds(args.data, _reading(args), _tell))
    na_prob = read_by_id(args.na_prob) if args.na_prob else None
    predictions = read_by_id(args.predictions)
    metrics = official(dataset, predictions, na_prob, args.na_threshold, missing=args.missing)
    if args.f1_characters:
        from babl.evaluation.characters import f1_characters

        metrics["f1_characters"] = f1_characters(dataset, predictions)
    print(json.dumps(metrics, indent=2))


def compare(args: argparse.Namespace) -> None:
    """Prints how two prediction files differ, and how sure that is."""
    from babl.data.squad import load_golds
    from babl.evaluation.compare import Side, describe
    from babl.evaluation.compare import compare as paired
    from babl.evaluation.squad import read_by_id

    data = load_golds(args.data, _reading(args), _tell)
    a = Side(args.a, data, read_by_id(args.a))
    b = Side(args.b, load_golds(args.data_b, _reading(args), _tell) if args.data_b else data, read_by_id(args.b))
    found = paired(a, b, args.common)
    print(json.dumps(found, indent=2, ensure_ascii=False) if args.json else describe(found))


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
    train, test = (load_squad(path, _reading(args), told.append) for path in (args.train, args.test))
    found = find_overlap(train, test)
    corpus = corpus_overlap(test, documents) if args.corpus else None
    print(*told, sep="\n", file=sys.stderr)
    if args.out:
        save(found, corpus, args.out)
    if args.json:
        print(json.dumps(report(found, corpus), indent=2))
    else:
        print(markdown(found, corpus), end="")


def query(args: argparse.Namespace) -> None:
    """Prints a model's answer to one question."""
    import math

    from babl.data.contexts import View
    from babl.evaluation.predictions import Asking, predict, refuse_overlong
    from babl.evaluation.runner import longest_prompt

    context = args.context
    if args.context_file:
        try:
            context = args.context_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--context-file: {args.context_file} cannot be read ({error})") from None
    engine = _engine(args)
    longest = longest_prompt(engine, args.max_new_tokens)
    asking = Asking(longest, longest // 4, args.max_new_tokens, chat=args.chat, system=args.system)
    views = [View("query", args.question, context)]
    refuse_overlong(engine, views, asking)
    (answer,) = predict(engine, views, asking, progress=False)
    if args.json:
        found = {"answer": answer.prediction, "probability": math.exp(answer.log_prob), "complete": answer.complete}
        print(json.dumps(found | {"windows": answer.windows}, ensure_ascii=False))
    else:
        print(answer.prediction)


def generate(args: argparse.Namespace) -> None:
    """Prints a prompt's continuation as it is written."""
    from dataclasses import asdict

    from babl.generation.conversation import prompt_style
    from babl.text.prompts import prompt_ids

    config = _sampling(args, num_beams=args.num_beams, length_penalty=args.length_penalty)
    engine = _engine(args)
    style = prompt_style(engine, args.chat, args.system)
    (prompt,) = prompt_ids([args.prompt], engine.tokenizer, style, args.system)
    stream = engine.stream(prompt, **asdict(config))
    for piece in stream:
        if not args.json:
            print(piece, end="", flush=True)
    answer = stream.answer
    if args.json:
        print(json.dumps(asdict(answer), ensure_ascii=False))
    else:
        print()
        if not answer.complete:
            limit = f"--max-new-tokens {args.max_new_tokens}" if answer.finish == "length" else "the model's context"
            print(f"babl generate: ended at {limit}", file=sys.stderr)


def chat(args: argparse.Namespace) -> int:
    """Runs scripts/chat.py."""
    from babl.generation.session import Session
    from babl.scripts.chat import run

    session = Session.load(args.resume) if args.resume else Session(args.model, args.system)
    session.model = args.model
    return run(session, _sampling(args), args.device, args.dtype)


def serve(args: argparse.Namespace) -> int:
    """Serves the browser until it is told to end."""
    from babl.web.serve import Place, add_user
    from babl.web.serve import serve as run

    if args.add_user is None:
        return run(Place(args.host, args.port, args.data, args.models))
    from getpass import getpass

    password = getpass(f"Password of {args.add_user}: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    add_user(args.add_user, password, args.data)
    return 0


def feedback(args: argparse.Namespace) -> None:
    """Writes SQuAD files that `babl train` reads, and prints how many questions each has."""
    from babl.data.squad import to_squad
    from babl.web.serve import Place, prepare

    prepare(Place(data=args.data))
    from babl.web.chat.selectors import judged
    from babl.web.chat.squad_io import corrections

    found = corrections(judged(), args.test_share)
    test = args.out.with_name(f"{args.out.stem}-test{args.out.suffix}")
    if not found.train:
        raise UserError("no answer about a passage has been judged in a way that tells what is right")
    facts: dict[str, Any] = {"undecided": found.undecided}
    for path, examples in ((args.out, found.train), (test, found.test)):
        if examples:
            try:
                path.write_text(json.dumps(to_squad(examples), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(f"{path} cannot be written ({error.strerror})") from None
            facts[str(path)] = len(examples)
    _show(facts, args.json)


def models(args: argparse.Namespace) -> None:
    """Prints a line for each model folder."""
    from babl.generation.memory import need
    from babl.models.weights import describe

    if not args.models.is_dir():
        raise UserError(f"--models: {args.models} is no folder; `babl pull` makes one")
    rows: list[dict[str, Any]] = []
    for folder in sorted(path.parent for path in args.models.rglob("config.json")):
        if any(part.startswith(".") for part in folder.relative_to(args.models).parts):
            continue  # a pull that has not ended
        try:
            facts = describe(folder)
            if facts["tokenizer"] == "none":
                raise UserError(f"{folder}: no tokenizer here")
        except UserError as error:
            rows.append({"model": str(folder), "unusable": str(error)})
        else:
            needed = need(facts, args.device, args.dtype, args.context)
            rows.append({"model": str(folder)} | facts | needed.facts())
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    width = max((len(row["model"]) for row in rows), default=0)
    for row in rows:
        told = f"unusable: {row['unusable']}" if "unusable" in row else _describe_row(row)
        line = f"{row['model']:<{width}}  {told}"
        print(line.encode(errors="backslashreplace").decode())  # a folder's name need not be UTF-8
    if not rows:
        print(f"no model in {args.models}; `babl pull REPO_ID` fetches one", file=sys.stderr)


def _describe_row(row: dict[str, Any]) -> str:
    size = f"{row['parameters'] / 1e6:.1f} M parameters, {row['bytes'] / 2**20:.1f} MiB of {row['dtypes']}"
    needed = f"{row['needed_bytes'] >> 20:,} MiB of {row['free_bytes'] >> 20:,} free"
    where = f"{row['loaded_dtype']} on {row['device']}, {row['cache_tokens']:,} tokens"
    fits = "fits" if row["fits"] else "does not fit" + (f" beyond {row['room']:,} tokens" if row["room"] else "")
    return f"{row['family']}, {size}, context {row['context'] or 'any'}, {fits}: needs {needed} ({where})"


def pull(args: argparse.Namespace) -> None:
    """Prints the folder that now holds the model."""
    from babl.models.hub import pull as fetch

    def say(line: str) -> None:
        print(f"babl pull: {line}", file=sys.stderr)

    folder = args.to or Path("models") / args.repo_id.split("/")[-1]
    print(fetch(args.repo_id, folder, args.revision, args.pickles, say))


def convert(args: argparse.Namespace) -> None:
    """Prints the folder that now holds safetensors."""
    from babl.models.convert import convert as run

    print(run(args.folder, args.to, lambda line: print(f"babl convert: {line}", file=sys.stderr)))


def export(args: argparse.Namespace) -> None:
    """Prints the folder that now holds the checkpoint's model."""
    import torch

    from babl.models import from_pretrained, save_pretrained
    from babl.text import load_tokenizer
    from babl.training.checkpoint import MANIFEST, find_fault, written_whole

    if args.to.exists():
        raise UserError(f"{args.to} is there already; remove it, or choose another folder")
    checkpoint = Path(args.checkpoint)
    fault = find_fault(checkpoint) if (checkpoint / MANIFEST).exists() else None
    if fault:
        raise UserError(f"{checkpoint}: {fault}")
    model, tokenizer = from_pretrained(checkpoint, getattr(torch, args.dtype)), load_tokenizer(checkpoint)
    with written_whole(args.to) as folder:
        save_pretrained(model, folder)
        tokenizer.save(folder)
    print(args.to)


def info(args: argparse.Namespace) -> None:
    """Prints what a folder holds."""
    from babl.generation.memory import need
    from babl.models.weights import describe
    from babl.training.checkpoint import MANIFEST, find_fault

    facts = describe(Path(args.model))
    facts |= need(facts, args.device, args.dtype, args.context).facts()
    if (Path(args.model) / MANIFEST).exists():
        facts["whole"] = find_fault(Path(args.model)) or "yes"
    _show(facts, args.json)


def experiment(args: argparse.Namespace) -> int:
    """Runs scripts/experiment.py."""
    from babl.scripts import experiment as program

    if args.action == "report":
        return program.report(args.config, args.overrides)
    if args.action == "verify":
        return program.verify(args.config, args.overrides)
    if args.dry_run:
        return program.dry_run(args.config, args.overrides)
    return program.run(program.Request(args.config, args.overrides, args.only, args.jobs, args.limit_minutes))


def verify(args: argparse.Namespace) -> int:
    """Runs scripts/verify."""
    from babl.scripts.verify.edit import summary
    from babl.scripts.verify.program import LOOP, Request, chosen_cases, prove
    from babl.scripts.verify.statements import parse
    from babl.scripts.verify.table import show

    script, said = args.script or LOOP, parse(args.fixed, args.rate)
    cases, after = chosen_cases(args.quick, args.family)
    request = Request(
        script, cases, after, watch=True, itself=args.itself, said=said, base=args.base or LOOP,
        ignored=args.ignore, overrides=args.overrides,
    )  # fmt: skip
    rows = prove(request)
    return show(str(script), rows, args.json, summary(rows))


def doctor(args: argparse.Namespace) -> None:
    """Prints versions, processors and what is missing."""
    import importlib.metadata
    import importlib.util
    import os
    import platform

    import torch

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = {
        "babl": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "gpu": cuda,
        "trains": "float32" + (", bfloat16" if cuda != "none" else "; bfloat16 is slow on most CPUs"),
    }
    uses = {
        "deepspeed": "distributed.backend=zero1, zero2, zero3",
        "tensorboard": "train.tensorboard=true",
        "pyarrow": "data files in Parquet",
        "triton": "kernels on a GPU",
    }
    for package, use in uses.items():
        found = importlib.util.find_spec(package) is not None
        facts[package] = importlib.metadata.version(package) if found else f"not installed (for {use})"
    _show(facts, args.json)


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {_plain(value)}")


def _plain(value: Any) -> str:
    """Returns a figure, or several, for people: two decimals."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return " to ".join(map(_plain, value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
