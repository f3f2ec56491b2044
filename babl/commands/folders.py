"""The verbs on model folders: `models`, `pull`, `convert`, `export` and `info`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from babl.commands.options import Verbs, add_need, add_verb, print_facts
from babl.errors import UserError


def add_models(verbs: Verbs) -> None:
    """Adds `babl models`."""
    sub = add_verb(verbs, "models", models, "the model folders here, and which of them fit this machine")
    sub.add_argument("--models", type=Path, default=Path("models"), metavar="DIR", help="default models")
    add_need(sub)


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


def add_pull(verbs: Verbs) -> None:
    """Adds `babl pull`."""
    sub = add_verb(verbs, "pull", pull, "fetch a model folder from the Hugging Face hub (HF_ENDPOINT, HF_TOKEN)")
    sub.add_argument("repo_id", metavar="REPO_ID")
    sub.add_argument("--to", type=Path, metavar="DIR", help="default models/NAME")
    sub.add_argument("--revision", default="main", metavar="REV", help="branch, tag or commit (default main)")
    sub.add_argument("--pickles", action="store_true", help="where it has no safetensors: the pickles, to be converted")


def pull(args: argparse.Namespace) -> None:
    """Prints the folder that now holds the model."""
    from babl.models.hub import pull as fetch

    def say(line: str) -> None:
        print(f"babl pull: {line}", file=sys.stderr)

    folder = args.to or Path("models") / args.repo_id.split("/")[-1]
    print(fetch(args.repo_id, folder, args.revision, args.pickles, say))


def add_convert(verbs: Verbs) -> None:
    """Adds `babl convert`."""
    sub = add_verb(
        verbs, "convert", convert, "pickled weights to safetensors, read in a process that can do nothing else"
    )
    sub.add_argument("folder", type=Path, metavar="FOLDER", help="with pytorch_model.bin, or its shards")
    sub.add_argument("--to", type=Path, metavar="DIR", help="a new folder; default FOLDER itself, beside the pickles")


def convert(args: argparse.Namespace) -> None:
    """Prints the folder that now holds safetensors."""
    from babl.models.convert import convert as run

    print(run(args.folder, args.to, lambda line: print(f"babl convert: {line}", file=sys.stderr)))


def add_export(verbs: Verbs) -> None:
    """Adds `babl export`."""
    sub = add_verb(verbs, "export", export, "a checkpoint's model alone: weights, config and tokenizer")
    sub.add_argument("checkpoint", metavar="CHECKPOINT")
    sub.add_argument("to", type=Path, metavar="DIR")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


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


def add_info(verbs: Verbs) -> None:
    """Adds `babl info`."""
    sub = add_verb(verbs, "info", info, "what a model folder or checkpoint holds, and whether it is whole")
    sub.add_argument("model", metavar="MODEL")
    add_need(sub)


def info(args: argparse.Namespace) -> None:
    """Prints what a folder holds."""
    from babl.generation.memory import need
    from babl.models.weights import describe
    from babl.training.checkpoint import MANIFEST, find_fault

    facts = describe(Path(args.model))
    facts |= need(facts, args.device, args.dtype, args.context).facts()
    if (Path(args.model) / MANIFEST).exists():
        facts["whole"] = find_fault(Path(args.model)) or "yes"
    print_facts(facts, args.json)
