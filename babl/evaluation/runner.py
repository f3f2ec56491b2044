"""A model's answers to a data set, and their scores."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from babl.data.collate import make_prompts
from babl.data.contexts import Arm
from babl.data.squad import Example, to_squad
from babl.evaluation.squad import question_scores, score
from babl.evaluation.statistics import cluster_bootstrap
from babl.generation import Engine, GenerationConfig
from babl.generation.sampling import LOOKUP_TOKENS
from babl.text import Tokenizer
from babl.text.normalize import normalize_answer
from babl.text.prompts import clean_answer


@dataclass
class Evaluation:
    """What a model answered and how good it is.

    Attributes:
        predictions: Question id -> answer after `clean_answer`.
        metrics: Official keys in percent, and what the run lost or cut.
    """

    predictions: dict[str, str]
    metrics: dict[str, Any]

    def save(self, folder: Path) -> None:
        """The folder holds predictions.json and metrics.json."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in asdict(self).items():
            text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
            (folder / f"{name}.json").write_text(text, encoding="utf-8")


def evaluate(
    engine: Engine,
    examples: list[Example],
    arm: Arm,
    max_source_tokens: int = 512,
    stride: int = 128,
    max_new_tokens: int = 64,
    progress: bool = True,
) -> Evaluation:
    """Returns the answers of a model and their scores, with a 95 % interval clustered by article.

    Where a context takes several windows, the answer that the model finds likeliest wins.

    Args:
        engine: Answers.
        examples: The questions.
        arm: Which context they see.
        max_source_tokens: Longest prompt in tokens; longer contexts are read through windows.
        stride: Tokens neighbouring windows share.
        max_new_tokens: Most tokens of an answer.
        progress: Whether stderr shows a bar.
    """
    prompts = make_prompts(examples, arm, engine.tokenizer, max_source_tokens, stride, engine.style)
    config = GenerationConfig(max_new_tokens, prompt_lookup_num_tokens=LOOKUP_TOKENS)
    answers = engine.answer([prompt.text for prompt in prompts], config, progress=progress)
    best: dict[int, Any] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        if prompt.example not in best or answer.log_prob > best[prompt.example].log_prob:
            best[prompt.example] = answer
    predictions = {examples[i].id: clean_answer(answer.text) for i, answer in sorted(best.items())}
    data = to_squad(examples)
    scores = question_scores(data, predictions)
    titles = [s.title for s in scores.values()]
    exact = np.array([100 * s.exact for s in scores.values()])
    grades = sorted({s.grade for s in scores.values()} - {""})
    metrics = score(data, predictions) | {
        "exact_interval": cluster_bootstrap(exact, titles),
        "articles": len(set(titles)),
        "attainable_exact": attainable_exact(engine.tokenizer, examples),
        "context": arm,
        "windowed": len(prompts) - len(examples),
        "empty": sum(not text for text in predictions.values()),
        "cut_off": sum(not answer.complete for answer in best.values()),
    }
    if grades:
        metrics["grades"] = {
            grade: 100 * float(np.mean([s.exact for s in scores.values() if s.grade == grade])) for grade in grades
        }
    return Evaluation(predictions, metrics)


def longest_prompt(engine: Engine, max_new_tokens: int) -> int:
    """Returns how many tokens of a question and its context are read at once: 512, or what the model has room for."""
    return min(512, engine.prompt_limit(max_new_tokens) or 512)


def attainable_exact(tokenizer: Tokenizer, examples: list[Example]) -> float:
    """Returns the exact match, in percent, of a model that answers every question right, through this tokenizer.

    A gold that does not survive encoding and decoding (T5's normalises "½", for instance) cannot be written.
    """
    reachable = [
        e.impossible
        or any(
            normalize_answer(tokenizer.decode(tokenizer.encode(a.text))) == normalize_answer(a.text) for a in e.answers
        )
        for e in examples
    ]
    return 100 * sum(reachable) / len(reachable)
