"""A run's folder before its first step: run.toml and, where the configuration names none, a tokenizer of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babl.config import save_config
from babl.data.squad import Example
from babl.errors import UserError
from babl.models.build import ModelConfig
from babl.models.weights import FAMILIES
from babl.text import train_tokenizer
from babl.text.prompts import Style, qa_prompt
from babl.training.checkpoint import written_whole


@dataclass
class RunConfig:
    """Where the run lives; `resume` goes on from its newest whole checkpoint."""

    name: str = "run"
    dir: str = "runs"
    seed: int = 0
    resume: bool = False


def begin_folder(folder: Path, config: Any, resume: bool) -> None:
    """The folder is there and holds run.toml.

    Raises:
        UserError: It holds a run that is not to be gone on with, or it cannot be written.
    """
    if (folder / "metrics.jsonl").exists() and not resume:
        raise UserError(f"{folder}: a run is there already; go on with run.resume=true, or choose another run.name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "run.toml")
    except OSError as error:
        raise UserError(f"run.dir: {folder} cannot be written ({error.strerror})") from None


def prepare_tokenizer(target: Path, cfg: ModelConfig, resume: bool, examples: list[Example]) -> None:
    """Where the configuration names no tokenizer, `target` holds one made from the examples; a resumed run keeps it."""
    if cfg.path or cfg.tokenizer or (resume and target.exists()):
        return
    style: Style = "t5" if FAMILIES[cfg.family].model.is_encoder_decoder else "decoder"
    with written_whole(target) as aside:
        train_tokenizer((qa_prompt(e.question, e.context, style) for e in examples), cfg.tokenizer_size, aside)
