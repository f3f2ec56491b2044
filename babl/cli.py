"""The `babl` command: puts the verbs of babl/commands together, and turns errors into exit codes."""

import argparse
import os
import sys

from babl import __version__
from babl.commands import asking, browser, folders, machine, scoring, training
from babl.errors import EXTRA_OF, UserError, not_installed

VERBS = (  # in the order of `babl --help`
    training.add_demo,
    training.add_train,
    scoring.add_evaluate,
    scoring.add_score,
    scoring.add_compare,
    scoring.add_overlap,
    asking.add_query,
    asking.add_generate,
    asking.add_chat,
    browser.add_serve,
    browser.add_feedback,
    folders.add_models,
    folders.add_pull,
    folders.add_convert,
    folders.add_export,
    folders.add_info,
    training.add_experiment,
    training.add_runs,
    training.add_plot,
    training.add_verify,
    machine.add_doctor,
)


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns 0, 1 where a run failed, or 2 where the input was wrong."""
    arguments = sys.argv[1:] if argv is None else argv
    # Threads that spin at barriers lose all their time where another process wants the core; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
            from babl import kernel_choice

            kernel_choice.use_kernels(args.kernels)
        return args.run(args) or 0
    except UserError as error:
        if args.debug:
            raise
        print(f"babl {args.verb}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # a verb whose extra is not there
        module = error.name or ""
        if args.debug or module.partition(".")[0] not in EXTRA_OF:
            raise
        print(f"babl {args.verb}: {not_installed(module)}", file=sys.stderr)
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
    for add in VERBS:
        add(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
