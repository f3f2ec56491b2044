"""The verbs of the web app: `serve` and `feedback`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from babl.commands.options import Verbs, add_verb, print_facts
from babl.errors import UserError


def add_serve(verbs: Verbs) -> None:
    """Adds `babl serve`."""
    sub = add_verb(verbs, "serve", serve, "talk to the models in the browser")
    sub.add_argument("--models", type=Path, action="append", default=[], metavar="DIR", help="default models and runs")
    sub.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1; another one needs BABL_AUTH=login")
    sub.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000; 0 takes a free one")
    sub.add_argument("--data", type=Path, metavar="DIR", help="of the database; default BABL_HOME, else ~/.babl")
    sub.add_argument("--add-user", metavar="NAME", help="let NAME log in with a password it asks for, and end")
    sub.add_argument("--remove-user", metavar="NAME", help="remove NAME and everything of theirs, and end")


def serve(args: argparse.Namespace) -> int:
    """Runs the server until it is stopped."""
    from babl.web.serve import ServerOptions, add_user, remove_user
    from babl.web.serve import serve as run_server

    if args.remove_user is not None:
        number = remove_user(args.remove_user, args.data)
        print(f"{args.remove_user} and {number:,} conversations are removed")
        return 0
    if args.add_user is None:
        return run_server(ServerOptions(args.host, args.port, args.data, args.models))
    from getpass import getpass

    password = getpass(f"Password of {args.add_user}: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    add_user(args.add_user, password, args.data)
    return 0


def add_feedback(verbs: Verbs) -> None:
    """Adds `babl feedback`."""
    sub = add_verb(verbs, "feedback", feedback, "what people said of answers in the browser, as questions to train on")
    sub.add_argument("action", choices=("export",))
    sub.add_argument("out", type=Path, metavar="OUT.json")
    sub.add_argument(
        "--test-share", type=float, default=0.0, metavar="P", help="keep this share of the passages for OUT-test.json"
    )
    sub.add_argument("--data", type=Path, metavar="DIR", help="as of `babl serve`")
    sub.add_argument("--json", action="store_true")


def feedback(args: argparse.Namespace) -> None:
    """Writes SQuAD files that `babl train` reads, and prints how many questions each has."""
    from babl.data.squad import to_squad
    from babl.web.serve import ServerOptions, prepare

    prepare(ServerOptions(data=args.data))
    from babl.web.chat.corrections import corrections
    from babl.web.chat.selectors import judged

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
    print_facts(facts, args.json)
