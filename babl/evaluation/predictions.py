"""A model's answers to many questions, stored line by line: what is killed goes on, and nothing is answered twice."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from babl.data.collate import Prompt, make_prompts
from babl.data.contexts import View
from babl.errors import UserError
from babl.files import file_hash
from babl.generation import Engine, GenerationConfig
from babl.generation.conversation import prompt_style
from babl.generation.sampling import LOOKUP_TOKENS
from babl.text.prompts import ANSWER_END, CLEAN_ANSWER_VERSION, Message, clean_answer, qa_target

CHUNK = 256  # views answered and stored together, always the same ones, so that rounding does not depend on a kill
DECIDING = ("models", "generation", "text", "data", "ops.py", "kernel_choice.py")  # rooms whose code decides an answer


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer.

    Attributes:
        id: Of the question.
        prediction: The answer after `clean_answer`.
        log_prob: Natural logarithm of its probability; 0 where the question was too long to be asked.
        tokens: Written, the end included.
        complete: Whether it ended by itself.
        windows: Prompts the context was read through; 0 where the question was too long, and so has an empty answer.
        no_answer: Probability of writing that there is no answer, where it was asked for.
    """

    id: str
    prediction: str
    log_prob: float
    tokens: int
    complete: bool
    windows: int
    no_answer: float | None = None


@dataclass(frozen=True)
class PromptLimits:
    """How questions are asked.

    Attributes:
        max_source_tokens: Longest prompt in tokens; longer contexts are read through windows.
        stride: Tokens neighbouring windows share.
        max_new_tokens: Most tokens of an answer.
        no_answer: Whether to score, for each question, that it has none.
        chat: Whether the model's chat template words the prompts, in place of the wording of training.
        before: What stands before every question: a system message for such a template, worked examples.
    """

    max_source_tokens: int = 512
    stride: int = 128
    max_new_tokens: int = 64
    no_answer: bool = False
    chat: bool = False
    before: tuple[Message, ...] = ()


def refuse_overlong(engine: Engine, views: Sequence[View], limits: PromptLimits) -> None:
    """Every question can be asked.

    Raises:
        UserError: One is too long; the first is named.
    """
    _, overlong = _prompts(engine, views, limits)
    if overlong:
        first = next(iter(overlong.values()))
        raise UserError(f"{len(overlong):,} of {len(views):,} questions are too long to be asked, first: {first}")


def predict(engine: Engine, views: Sequence[View], limits: PromptLimits, progress: bool = True) -> list[Prediction]:
    """Returns an answer to each view; where a context takes several windows, the likeliest answer of them.

    A question too long to be asked has an empty answer, so that it counts.
    """
    with tqdm(total=len(views), desc="questions", unit="q", disable=not progress) as bar:
        predictions = []
        for at in range(0, len(views), CHUNK):
            predictions += _chunk(engine, views[at : at + CHUNK], limits)
            bar.update(len(predictions) - at)
    return predictions


def predict_into(
    path: Path, engine: Engine, views: Sequence[View], limits: PromptLimits, key: str, progress: bool = True
) -> list[Prediction]:
    """Returns what `predict` does, each chunk on disk before the next is asked; what the file has stays.

    Args:
        path: JSON lines, the first one the key's.
        engine: Answers.
        views: The questions.
        limits: How.
        key: Of everything that decides the answers (`answer_key`); a file of another key is begun anew.
        progress: Whether stderr shows a bar.

    Raises:
        UserError: The file cannot be written.
    """
    done = stored(path, key, views)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        with aside.open("w", encoding="utf-8") as file:
            _append(file, [{"key": key}, *map(asdict, done)])
        aside.rename(path)  # without what a crash has cut short
        with (
            path.open("a", encoding="utf-8") as file,
            tqdm(total=len(views), initial=len(done), desc=path.stem, unit="q", disable=not progress) as bar,
        ):
            for at in range(len(done), len(views), CHUNK):
                chunk = _chunk(engine, views[at : at + CHUNK], limits)
                _append(file, map(asdict, chunk))
                bar.update(len(chunk))
                done += chunk
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return done


def stored(path: Path, key: str, views: Sequence[View]) -> list[Prediction]:
    """Returns the whole chunks that a file of this key has of the views, from the first on."""
    if key_of(path) != key:
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last one is empty, or was cut short
    whole = len(lines) - 1 if len(lines) - 1 == len(views) else (len(lines) - 1) // CHUNK * CHUNK
    found = [Prediction(**json.loads(line)) for line in lines[1 : 1 + whole]]
    if [p.id for p in found] != [view.id for view in views[:whole]]:
        return []
    return found


def key_of(path: Path) -> str | None:
    """Returns the key of a file of `predict_into`, or None where it is not there, or is no such file."""
    try:
        with path.open(encoding="utf-8") as file:
            return json.loads(file.readline())["key"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_predictions(path: Path) -> list[Prediction]:
    """Returns the answers in a file of `predict_into`.

    Raises:
        UserError: It cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[1:-1]  # an answer may hold what splitlines splits at
        return [Prediction(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not the predictions that were written ({error})") from None


def answer_key(engine: Engine, folder: Path, views: Sequence[View], limits: PromptLimits) -> str:
    """Returns a hash of all that decides the answers: weights, tokenizer, questions, decoding, numbers and code."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".model", ".json"))
    parts: Mapping[str, Any] = {
        # A checkpoint has files of its trainer beside the model's.
        "model": {p.name: file_hash(p) for p in files if not p.name.startswith(("optimizer", "trainer", "manifest"))},
        "views": hashlib.sha256("\n".join(map(repr, views)).encode()).hexdigest(),
        "limits": asdict(limits),
        "format": f"{next(engine.model.parameters()).dtype} on {engine.device.type}",
        "cleaning": CLEAN_ANSWER_VERSION,
        "code": code_hash(DECIDING),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def code_hash(rooms: Sequence[str]) -> str:
    """Returns the sha256, in hex, of the Python sources of these rooms of the package."""
    home = Path(__file__).parent.parent
    digest = hashlib.sha256()
    files = [
        file for room in rooms for file in ([home / room] if room.endswith(".py") else (home / room).rglob("*.py"))
    ]
    for path in sorted(files):
        digest.update(path.relative_to(home).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _prompts(engine: Engine, views: Sequence[View], limits: PromptLimits) -> tuple[list[Prompt], dict[str, str]]:
    style = prompt_style(engine, limits.chat, limits.before)
    return make_prompts(views, engine.tokenizer, limits.max_source_tokens, limits.stride, style, limits.before)


def _chunk(engine: Engine, views: Sequence[View], limits: PromptLimits) -> list[Prediction]:
    prompts, _ = _prompts(engine, views, limits)
    config = GenerationConfig(limits.max_new_tokens, stop_strings=ANSWER_END, prompt_lookup_num_tokens=LOOKUP_TOKENS)
    answers = engine.answer([prompt.ids for prompt in prompts], config)
    windows = Counter(prompt.view for prompt in prompts)
    best: dict[int, int] = {}  # view -> the prompt whose answer is likeliest
    for i, prompt in enumerate(prompts):
        if prompt.view not in best or answers[i].log_prob > answers[best[prompt.view]].log_prob:
            best[prompt.view] = i
    unanswerable: dict[int, float] = {}
    if limits.no_answer:
        style = prompt_style(engine, limits.chat, limits.before)
        scores = engine.score([prompts[i].ids for i in best.values()], [qa_target(None, style)] * len(best))
        unanswerable = {view: math.exp(sum(tokens)) for view, tokens in zip(best, scores, strict=True)}
    predictions = []
    for k, view in enumerate(views):
        if k not in best:
            predictions.append(Prediction(view.id, "", 0.0, 0, True, 0, 1.0 if limits.no_answer else None))
            continue
        a = answers[best[k]]
        clean = clean_answer(a.text)
        predictions.append(
            Prediction(view.id, clean, a.log_prob, len(a.ids), a.complete, windows[k], unanswerable.get(k))
        )
    return predictions


def _append(file: Any, rows: Any) -> None:
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.flush()
    os.fsync(file.fileno())
