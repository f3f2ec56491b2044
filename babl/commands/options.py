"""What verbs share: options, what is made of them, and how facts are printed."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]
else:  # a name for annotations alone
    Verbs = Any


def add_verb(verbs: Verbs, name: str, run: Callable[[argparse.Namespace], Any], text: str) -> argparse.ArgumentParser:
    """Returns the parser of a new verb, which `run` is called for."""
    sub = verbs.add_parser(name, help=text, description=text)
    sub.set_defaults(run=run)
    return sub


def add_sampling(sub: argparse.ArgumentParser, temperature: float) -> None:
    """Adds the options of a GenerationConfig."""
    sub.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    sub.add_argument("--temperature", type=float, default=temperature, metavar="T", help=f"default {temperature}")
    sub.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest (0: all)")
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest that sum to P")
    sub.add_argument("--min-p", type=float, default=0.0, metavar="P", help="share of the likeliest's probability")
    sub.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    sub.add_argument(
        "--stop",
        dest="stop_strings",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this; may be repeated",
    )
    sub.add_argument("--seed", type=int, default=0)


def add_chat_template(sub: argparse.ArgumentParser) -> None:
    """Adds the options of asking through a chat template."""
    sub.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    sub.add_argument("--system", default="", metavar="TEXT", help="with --chat: the system message")


def add_device(sub: argparse.ArgumentParser) -> None:
    """Adds where, in which type and with which kernels a model computes."""
    add_placement(sub)
    add_kernels(sub)


def add_need(sub: argparse.ArgumentParser) -> None:
    """Adds the options of verbs that say whether a model fits."""
    add_placement(sub)
    sub.add_argument("--context", type=int, metavar="N", help="tokens there must be memory for (default the model's)")
    sub.add_argument("--json", action="store_true")


def add_placement(sub: argparse.ArgumentParser) -> None:
    """Adds where and in which type a model computes."""
    sub.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    sub.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")


def add_kernels(sub: argparse.ArgumentParser) -> None:
    """Adds the choice of kernels."""
    sub.add_argument("--kernels", metavar="auto|on|off", help="Triton: where measured faster, wherever possible, never")


def add_reading(sub: argparse.ArgumentParser, *names: str) -> None:
    """Adds options of `Reading`, which a configuration has as data.NAME."""
    options: dict[str, dict[str, Any]] = {
        "faulty": {"choices": ("refuse", "leave-out"), "help": "records that cannot be read (default refuse)"},
        "strict": {"action": "store_true", "help": "refuse answers that do not stand at their offsets"},
        "impossible": {"choices": ("refuse", "unanswerable"), "help": "answers beside is_impossible: true"},
        "articles": {"choices": ("title", "context"), "help": "what questions of one article share (default title)"},
    }
    for name in names:
        sub.add_argument(f"--{name}", default=argparse.SUPPRESS, **options[name])


def reading_config(args: argparse.Namespace) -> Any:
    """Returns the Reading that the options of `add_reading` ask for."""
    from dataclasses import fields

    from babl.data.squad import Reading

    given = vars(args)
    return Reading(**{field.name: given[field.name] for field in fields(Reading) if field.name in given})


def warn(line: str) -> None:
    """Prints a line on stderr."""
    print(line, file=sys.stderr)


def load_engine(args: argparse.Namespace) -> Any:
    """Returns the engine of the model asked for, and says what of its generation_config.json is not used."""
    from babl.generation import Engine
    from babl.generation.published import unused_settings

    engine = Engine.load(args.model, args.device, args.dtype)
    if unused := unused_settings(args.model):
        warn(unused)
    return engine


def sampling_config(args: argparse.Namespace) -> Any:
    """Returns the GenerationConfig of the options, which have the names of its fields."""
    from dataclasses import fields

    from babl.generation import GenerationConfig

    given = vars(args)
    return GenerationConfig(
        **{field.name: given[field.name] for field in fields(GenerationConfig) if field.name in given}
    )


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Prints facts as JSON, or a line each."""
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
