"""Where a run stands: at its newest whole checkpoint, which it goes on from only as what it was, or at step 0.

The configuration is compared, key by key, with the run.toml in the checkpoint. A key that changes what is computed must
be the same, unless `run.allow` names it. Those in MAY_CHANGE may differ: with them a run computes the same, or they say
only for how long. Data are compared by their content, wherever the files lie. Tokenizer and weights come from the
checkpoint. docs/resume.md has the table of all keys.
"""

import hashlib
import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from babl.data.squad import Example
from babl.errors import UserError, did_you_mean
from babl.models.build import ModelConfig
from babl.training.checkpoint import Checkpoints, newest_whole, read_state
from babl.training.folder import CONFIG, refuse_existing

MAY_CHANGE = {
    # where the run and its data lie
    "run.name",
    "run.dir",
    "run.resume",
    "run.allow",
    "data.train",
    "data.validation",
    # for how long: upwards, or to no more than is done
    "train.steps",
    # how the same steps are computed
    "batch.accumulation",
    "distributed.backend",
    "distributed.offload",
    "distributed.deepspeed",
    "distributed.timeout_seconds",
    "train.activation_checkpointing",
    "train.preflight",
    # what is kept and shown of them
    "train.validate_every",
    "train.save_every",
    "train.keep_last",
    "train.keep_every",
    "train.async_save",
    "train.tensorboard",
}
UNSET = "unset"


class Start(NamedTuple):
    """Where a run begins.

    Attributes:
        checkpoint: That it goes on from; None at step 0.
        state: What the loop has saved with it.
        data: The content of the training and validation sets, as sha256, to be saved with the next one.
    """

    checkpoint: Path | None
    state: dict[str, Any]
    data: dict[str, str]

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self.state.get("step", 0)

    def model(self, cfg: ModelConfig) -> ModelConfig:
        """Returns what to build the model from: a checkpoint has the tokenizer, and all of a model from a folder."""
        if self.checkpoint is None:
            return cfg
        return replace(cfg, tokenizer=str(self.checkpoint), path=str(self.checkpoint) if cfg.path else "")


def find_start(
    folder: Path, cfg: Any, sets: Sequence[list[Example]], checkpoints: Checkpoints, say: Callable[[str], None]
) -> Start:
    """Returns where a run begins; nothing in its folder has changed.

    Args:
        folder: Of the run.
        cfg: The whole configuration, a dataclass of sections of which `run` is one.
        sets: Training and validation questions.
        checkpoints: Of the run; every rank calls.
        say: Told what was passed over, and what differs.

    Raises:
        UserError: There is a run and `run.resume` is false, no checkpoint is whole, or the run is another one now.
    """
    world = checkpoints.world
    return world.gather(_find(folder, cfg, sets, checkpoints, say) if world.is_main else Start(None, {}, {}))[0]


def _find(
    folder: Path, cfg: Any, sets: Sequence[list[Example]], checkpoints: Checkpoints, say: Callable[[str], None]
) -> Start:
    data = {name: content_hash(examples) for name, examples in zip(("train", "validation"), sets, strict=True)}
    if not cfg.run.resume:
        refuse_existing(folder)
        return Start(None, {}, data)
    newest, passed_over = newest_whole(checkpoints.folder)
    for line in passed_over:
        say(line)
    if newest is None:
        return Start(None, {}, data)
    state = read_state(newest)
    defaults, now = flat(asdict(type(cfg)())), flat(asdict(cfg)) | _hashes(data)
    try:
        saved = tomllib.loads((newest / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{newest / CONFIG}: cannot be read ({error}), so the run cannot go on as what it was; begin one of "
            "another run.name from the checkpoint with model.path"
        ) from None
    before = defaults | flat(saved) | _hashes(state["data"])
    for line in check_changes(before, now, state["step"], cfg.run.allow, newest):
        say(line)
    return Start(newest, state, data)


def _hashes(data: dict[str, str]) -> dict[str, str]:
    return {f"data.{name}.sha256": digest for name, digest in data.items()}


def content_hash(examples: list[Example]) -> str:
    """Returns the sha256 of questions, contexts and answers, in their order."""
    return hashlib.sha256(msgspec.json.encode(examples)).hexdigest()


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of a nested configuration by dotted key."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return values


def check_changes(
    before: dict[str, Any], now: dict[str, Any], done: int, allow: Sequence[str], checkpoint: Path
) -> list[str]:
    """Returns a line for each change that the run goes on with.

    Args:
        before: The values by dotted key when the checkpoint was saved.
        now: Likewise, as they are.
        done: Steps that the checkpoint has done.
        allow: Keys that may differ.
        checkpoint: For the message.

    Raises:
        UserError: A change is neither among MAY_CHANGE nor allowed, or what is allowed is no key.
    """
    keys = sorted({*before, *now})
    for key in allow:
        if key not in keys:
            raise UserError(f"run.allow names '{key}', which is no key of the configuration{did_you_mean(key, keys)}")
    refused, told = {}, []
    for key in keys:
        then, value = before.get(key, UNSET), now.get(key, UNSET)
        if then == value:
            continue
        shown = f"{key} is {_shown(value)}, but was {_shown(then)}"
        if key in allow or (key in MAY_CHANGE and not (key == "train.steps" and done < value < then)):
            told += [] if key.startswith("run.") else [f"run.resume: {shown}"]
        else:
            refused[key] = shown
    if refused:
        raise UserError(
            f"run.resume: {'; '.join(refused.values())} when {checkpoint} was saved; begin a run of another run.name "
            f"from it with model.path, or go on all the same with run.allow='{json.dumps(list(refused))}'"
        )
    return told


def _shown(value: Any) -> str:
    return value if value is UNSET else json.dumps(value, ensure_ascii=False, default=str)
