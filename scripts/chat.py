"""Talks to a model in the terminal: `babl chat MODEL`.

Answers appear as they are written; Ctrl-C stops the answer and not the program. Every message is kept in the
conversation's file before the next one is asked for, so `--resume ID` goes on even after a crash.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from babl.errors import UserError, did_you_mean
from babl.generation import Engine, GenerationConfig
from babl.generation.conversation import Reader
from babl.generation.published import unused_settings
from babl.generation.session import Session
from babl.text.prompts import ANSWER_END, clean_answer

COMMANDS = {
    "/context": "[TEXT | @FILE]  ask about this passage; without one, about none",
    "/system": "[TEXT]  what a chat model is told first; without one, nothing",
    "/model": "[FOLDER]  which model answers; another one goes on with the same conversation",
    "/save": "[FILE.md]  where the conversation is kept; with a file, write it there to be read",
    "/help": "this list",
    "/exit": "leave, as Ctrl-D does",
}


def run(session: Session, config: GenerationConfig, device: str, dtype: str) -> int:
    """Returns 0 once the user has left."""
    with suppress(ImportError):
        import readline  # noqa: F401 (lines can be edited and called back)

    engine = load(session.model, device, dtype)
    say(f"{session.model}: ask, or /help. Conversation {session.id}; Ctrl-C stops an answer, Ctrl-D leaves.")
    for message in session.messages:
        print(f"{'> ' if message['role'] == 'user' else ''}{message['content']}")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            say("\nCtrl-D or /exit leaves")
            continue
        try:
            if line == "/exit":
                break
            if line.startswith("/"):
                engine = command(line, session, engine, device, dtype)
            elif line:
                ask(line, session, engine, config)
        except UserError as error:
            say(str(error))
    if session.messages:
        say(f"go on with: babl chat {session.model} --resume {session.id}")
    return 0


def ask(question: str, session: Session, engine: Engine, config: GenerationConfig) -> None:
    """The question and the answer, whole or stopped, are in the conversation's file."""
    session.say("user", question)
    try:
        context, family = engine.model.context_length, engine.model.config.model_type
        reader = Reader.of(Path(session.model), family, context, engine.tokenizer)
        worded = session.worded(reader, config.max_new_tokens)
        if worded.cut_tokens and worded.windows:
            say(f"({worded.cut_tokens} tokens said before are not read: this model answers each question by itself)")
        elif worded.dropped:
            say(f"({worded.dropped} earlier messages no longer fit: a prompt may have {worded.limit} tokens)")
        session.save()
        if worded.question:
            config = replace(config, stop_strings=(*config.stop_strings, *ANSWER_END))
        with stopped_by_ctrl_c() as stop:
            if len(worded.prompts) == 1:
                stream = engine.stream(worded.prompts[0], cancelled=stop.is_set, **asdict(config))
                for piece in stream:
                    print(piece, end="", flush=True)
                answer = stream.answer
            else:  # windows of a long context: the likeliest answer of them
                answers = engine.answer(worded.prompts, config, cancelled=stop.is_set)
                answer = max(answers, key=lambda found: found.log_prob)
                print(answer.text, end="")
    except UserError:
        session.messages.pop()  # nobody answered it
        raise
    print()
    if not answer.complete:
        why = {"length": f"--max-new-tokens {config.max_new_tokens} reached", "context": "the model's context is full"}
        say(f"({why.get(answer.finish, 'stopped')})")
    text = clean_answer(answer.text) if worded.question else answer.text
    session.say("assistant", text)
    session.save()


def command(line: str, session: Session, engine: Engine, device: str, dtype: str) -> Engine:
    """Returns the engine to go on with, once the command is done.

    Raises:
        UserError: There is no such command, or its argument is not usable.
    """
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command{did_you_mean(name, COMMANDS)} (/help lists them)")
    if name == "/help":
        for known, text in COMMANDS.items():
            say(f"{known} {text}")
    elif name == "/context":
        session.context = read(argument[1:]) if argument.startswith("@") else argument
        tokens = len(engine.tokenizer.encode(session.context))
        say(f"context of {tokens} tokens" if session.context else "no context")
    elif name == "/system":
        session.system = argument
        heard = engine.style == "t5" or engine.tokenizer.chat_template or not argument
        unheard = "" if heard else " (this base model has no place for it)"
        say(f"system: {argument or 'none'}{unheard}")
    elif name == "/model":
        if argument:
            engine = load(argument, device, dtype)
            session.model = argument
        say(session.model)
    elif name == "/save":
        say(f"kept in {session.save()}")
        if argument:
            try:
                Path(argument).write_text(session.markdown(), encoding="utf-8")
            except OSError as error:
                raise UserError(f"{argument} cannot be written ({error.strerror})") from None
            say(f"written to {argument}")
    return engine


def load(folder: str, device: str, dtype: str) -> Engine:
    """Returns the engine of a folder, and says what of its generation_config.json is not used."""
    engine = Engine.load(folder, device, dtype)
    if unused := unused_settings(folder):
        say(unused)
    return engine


def read(file: str) -> str:
    """Returns a file's text."""
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error})") from None


def say(text: str) -> None:
    """What the program says itself stands on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def stopped_by_ctrl_c() -> Iterator[threading.Event]:
    """Yields an event that Ctrl-C sets, in place of interrupting the program."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
