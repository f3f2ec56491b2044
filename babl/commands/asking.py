"""The verbs that let a model write: `query`, `generate` and `chat`."""

import argparse
import json
import sys
from pathlib import Path

from babl.commands.options import (
    Verbs,
    add_chat_template,
    add_device,
    add_sampling,
    add_verb,
    load_engine,
    sampling_config,
)
from babl.errors import UserError


def add_query(verbs: Verbs) -> None:
    """Adds `babl query`."""
    sub = add_verb(verbs, "query", query, "one answer")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("question", metavar="QUESTION")
    context = sub.add_mutually_exclusive_group()
    context.add_argument("--context", metavar="TEXT")
    context.add_argument("--context-file", type=Path, metavar="FILE")
    sub.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    add_chat_template(sub)
    add_device(sub)
    sub.add_argument("--json", action="store_true")


def query(args: argparse.Namespace) -> None:
    """Prints a model's answer to one question."""
    import math

    from babl.data.contexts import View
    from babl.evaluation.predictions import PromptLimits, predict, refuse_overlong
    from babl.evaluation.runner import longest_prompt
    from babl.text.prompts import system_message

    context = args.context
    if args.context_file:
        try:
            context = args.context_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--context-file: {args.context_file} cannot be read ({error})") from None
    engine = load_engine(args)
    longest = longest_prompt(engine, args.max_new_tokens)
    limits = PromptLimits(
        longest, longest // 4, args.max_new_tokens, chat=args.chat, before=system_message(args.system)
    )
    views = [View("query", args.question, context)]
    refuse_overlong(engine, views, limits)
    (answer,) = predict(engine, views, limits, progress=False)
    if args.json:
        found = {"answer": answer.prediction, "probability": math.exp(answer.log_prob), "complete": answer.complete}
        print(json.dumps(found | {"windows": answer.windows}, ensure_ascii=False))
    else:
        print(answer.prediction)


def add_generate(verbs: Verbs) -> None:
    """Adds `babl generate`."""
    sub = add_verb(verbs, "generate", generate, "the raw continuation of a prompt, as it is written")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("prompt", metavar="PROMPT", help="may be empty: a text from nothing")
    add_chat_template(sub)
    add_sampling(sub, temperature=0.0)
    sub.add_argument("--num-beams", type=int, default=1, metavar="N", help="above 1, beam search")
    sub.add_argument("--length-penalty", type=float, default=1.0, metavar="A", help="of beams (default 1)")
    add_device(sub)
    sub.add_argument("--json", action="store_true")


def generate(args: argparse.Namespace) -> None:
    """Prints a prompt's continuation as it is written."""
    from dataclasses import asdict

    from babl.generation.conversation import prompt_style
    from babl.text.prompts import prompt_ids, system_message

    config = sampling_config(args)
    engine = load_engine(args)
    told = system_message(args.system)
    style = prompt_style(engine, args.chat, told)
    (prompt,) = prompt_ids([args.prompt], engine.tokenizer, style, told)
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


def add_chat(verbs: Verbs) -> None:
    """Adds `babl chat`."""
    sub = add_verb(verbs, "chat", chat, "talk to a model in the terminal")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--resume", metavar="ID", help="go on with a conversation")
    sub.add_argument("--system", default="", metavar="TEXT", help="what a chat model is told first")
    add_sampling(sub, temperature=0.7)
    add_device(sub)


def chat(args: argparse.Namespace) -> int:
    """Runs scripts/chat.py."""
    from babl.generation.session import Session
    from babl.scripts.chat import run

    session = Session.load(args.resume) if args.resume else Session(args.model, args.system)
    session.model = args.model
    return run(session, sampling_config(args), args.device, args.dtype)
