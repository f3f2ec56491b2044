"""Fine-tunes a model on question answering: the whole loop, to be read and edited.

    python scripts/train.py configs/debug_cpu.toml
    torchrun --nproc_per_node=8 scripts/train.py configs/t5_small_squad.toml optim.lr=5e-4 run.name=hot

Each `section.key=value` overrides the file. Without a configuration, configs/debug_cpu.toml runs. The run's folder
holds run.toml (what was run), metrics.jsonl (a line a step) and checkpoints/ (each a model folder). On SIGTERM, SIGUSR1
or SIGUSR2 the run saves within a step and exits with code 75.
"""

import io
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm

from babl.config import at_least, load_config, save_config
from babl.data.collate import Batch, Feature, check_context, collate, collate_causal, make_features, make_prompts
from babl.data.contexts import View
from babl.data.loader import BatchConfig, Loader, dropout_keys, plan_epoch
from babl.data.sets import DataConfig, load_sets, load_views
from babl.distributed.backend import DistributedConfig, make_backend
from babl.distributed.env import World, world
from babl.distributed.failure import EXIT_PREEMPTED, report
from babl.errors import UserError
from babl.generation import Engine
from babl.models.build import ModelConfig, build_model
from babl.models.weights import stored_weights
from babl.text.prompts import Style
from babl.training.checkpoint import Checkpoints, load_checkpoint
from babl.training.folder import RunConfig, begin_folder, prepare_tokenizer
from babl.training.loss import raise_nonfinite, token_loss
from babl.training.metrics import MetricsLog
from babl.training.optimizer import OptimConfig, make_optimizer
from babl.training.preemption import Preempted, asked_to_leave
from babl.training.preflight import try_batch, try_checkpoint
from babl.training.recompute import Recompute, recompute_blocks
from babl.training.schedule import learning_rate

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "debug_cpu.toml"


@dataclass
class LoopConfig:
    """How long, how exact, how often; a period of 0 means only at the end."""

    steps: int = 1000
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: Recompute = "none"
    validate_every: int = 0
    save_every: int = 0
    keep_last: int = 2
    keep_every: int = 0
    async_save: bool = False
    preflight: bool = True
    tensorboard: bool = False

    @property
    def checkpoints_at_once(self) -> int:
        """The most there are, the one being written included."""
        every = self.save_every or self.steps
        saves = math.ceil(self.steps / every)
        for_good = self.steps // math.lcm(every, self.keep_every) if self.keep_every else 0
        return min(saves, self.keep_last + 1 + for_good) if self.keep_last else saves


@dataclass
class TrainConfig:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        at_least(1, train__steps=self.train.steps, batch__accumulation=self.batch.accumulation)
        at_least(0, optim__lr=self.optim.lr, optim__max_grad_norm=self.optim.max_grad_norm, run__seed=self.run.seed)
        at_least(0, train__keep_last=self.train.keep_last, train__keep_every=self.train.keep_every)
        at_least(0, batch__examples=self.batch.examples)
        if self.train.precision == "fp16":
            raise UserError('train.precision is "fp16", which overflows in T5\'s feed-forward layers; use "bf16"')


def train(cfg: TrainConfig) -> Path:
    """Returns the last checkpoint, a model folder, of a run that has done all its steps."""
    with asked_to_leave() as asked, world() as me:
        folder = Path(cfg.run.dir) / cfg.run.name
        kept = cfg.train.keep_last, cfg.train.keep_every, cfg.train.async_save
        checkpoints = Checkpoints(folder / "checkpoints", me, *kept)
        say = partial(print, file=sys.stderr if me.is_main else io.StringIO())
        train_set, validation_set = load_sets(cfg.data, cfg.run.seed)
        if me.is_main:
            begin_folder(folder, cfg, cfg.run.resume)
            prepare_tokenizer(folder / "tokenizer", cfg.model, cfg.run.resume, train_set)
        me.barrier()
        model, tokenizer = build_model(cfg.model, folder / "tokenizer", cfg.run.seed)
        style: Style = "t5" if model.is_encoder_decoder else "decoder"
        window = tokenizer, cfg.data.max_source_tokens, cfg.data.stride, style
        train_views, validation_views = load_views(cfg.data, train_set), load_views(cfg.data, validation_set)
        features, losses = make_features(train_views, *window)
        validation, _ = make_features(validation_views, *window)
        check_context([*features, *validation], model.context_length)
        say(f"{len(train_set):,} questions, {len(train_views):,} shown, {len(features):,} examples; {losses}")
        words = {e.id: len(e.context.split()) for e in train_set}
        lengths, sizes = [feature.lengths for feature in features], [words[feature.id] for feature in features]
        loader = Loader(lengths, sizes, cfg.batch, cfg.run.seed, me.rank, me.size)
        recompute_blocks(model, cfg.train.activation_checkpointing)
        backend = make_backend(cfg.distributed, me, cfg.train.precision == "bf16")
        backend.setup(model, partial(make_optimizer, cfg=cfg.optim))
        load = partial(load_checkpoint, config=model.config, optimizer=cfg.optim.name, load=backend.load)
        step = 0
        newest, passed_over = checkpoints.newest_whole()
        for line in passed_over:
            say(line)
        if newest:
            state = load(newest)
            step = state["step"]
            loader.restore(state["loader"])
            say(f"resumed from {newest}")
        elif cfg.model.path:
            with stored_weights(model.config, Path(cfg.model.path)) as weights:
                backend.load(weights, {})

        def micro_batch(of: list[Feature], indices: list[int]) -> Batch:
            rows, keys = [of[i] for i in indices], dropout_keys(cfg.run.seed, step, indices)
            pad = tokenizer.pad_id or 0
            if model.is_encoder_decoder:
                return collate(rows, pad, model.config.decoder_start_token_id, keys).to(me.device)
            return collate_causal(rows, pad, keys).to(me.device)

        def save(into: Checkpoints) -> None:
            def write(target: Path) -> None:
                tokenizer.save(target)
                save_config(cfg, target / "run.toml")

            state = {"step": step, "optimizer": cfg.optim.name, "loader": loader.state()}
            into.save(step, backend.save(), model.config, state, write)

        model.train()
        if cfg.train.preflight:
            try_batch(backend, micro_batch(features, loader.longest()), say)
            if not newest:
                try_checkpoint(folder, me, save, load, cfg.optim, cfg.train.checkpoints_at_once, say)
        log = MetricsLog(folder, step, cfg.train.tensorboard) if me.is_main else None
        torch.set_flush_denormal(True)  # Adam's moments fade into denormals, which a CPU computes many times slower
        bar = tqdm(total=cfg.train.steps, initial=step, desc=cfg.run.name, unit="step", disable=not me.is_main)
        while True:
            done = step == cfg.train.steps
            if done or (step and cfg.train.validate_every and step % cfg.train.validate_every == 0):
                val_loss = validate(backend.model, validation, micro_batch, cfg.batch.tokens, me)
                if log:
                    log.write(step, validation_loss=val_loss)
                    say(f"step {step}: validation loss {val_loss:.4f}")
                    if backend.whole:
                        show_answers(Engine(model, tokenizer), validation_views[:3], window, say)
                    log.start_clock()
            if done:
                break
            step += 1
            me.seed(cfg.run.seed, step)
            batches = [micro_batch(features, indices) for indices in loader.next_step()]
            (targets,) = me.sum(sum(batch.targets for batch in batches))
            lr = learning_rate(cfg.optim.schedule, cfg.optim.lr, step, cfg.train.steps, cfg.optim.warmup_steps)
            total = torch.zeros((), device=me.device)
            for batch in batches:
                with backend.microbatch(last=batch is batches[-1]):
                    loss = token_loss(backend.model, batch, cfg.optim.label_smoothing) / targets
                    backend.backward(loss)
                total += loss.detach()
            grad_norm = backend.step(lr, cfg.optim.max_grad_norm)
            mean_loss, tokens, padded, examples, leaving = me.sum(
                total.item(),
                sum(b.tokens for b in batches),
                sum(b.padded for b in batches),
                sum(len(b.ids) for b in batches),
                asked(),
            )
            if not math.isfinite(mean_loss + grad_norm):
                raise_nonfinite(step, me, model, batches)
            if log:
                log.write(
                    step, int(tokens), loss=mean_loss, lr=lr, grad_norm=grad_norm, target_tokens=int(targets),
                    examples=int(examples), padding_fraction=round(1 - tokens / padded, 4),
                )  # fmt: skip
                bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
                bar.update()
            due = cfg.train.save_every and step % cfg.train.save_every == 0
            if due or leaving or step == cfg.train.steps:
                save(checkpoints)
            if leaving:
                checkpoints.join()
                raise Preempted(f"step {step}: saved, and left on a signal; run.resume=true goes on")
            if log:
                log.start_clock()
        checkpoints.join()
        bar.close()
        if log:
            log.close()
    return folder / "checkpoints" / "latest"


@torch.no_grad()
def validate(model: nn.Module, features: list[Feature], make_batch: Callable, tokens: int, me: World) -> float:
    """Returns the mean loss of a target token; every rank computes as many batches, so that nobody waits for ever."""
    batches = plan_epoch([f.lengths for f in features], tokens, seed=0, epoch=0)
    batches += [[]] * (-len(batches) % me.size)
    total = targets = 0.0
    model.eval()
    for indices in tqdm(batches[me.rank :: me.size], desc="validation", leave=False, disable=not me.is_main):
        batch = make_batch(features, indices)
        total += token_loss(model, batch).item()
        targets += batch.targets
    model.train()
    total, targets = me.sum(total, targets)
    return total / targets


def show_answers(engine: Engine, views: list[View], window: tuple, say: Callable) -> None:
    """A few answers stand beside what they should be; of a context too long for the model, one for each window."""
    prompts = make_prompts(views, *window)
    for prompt, answer in zip(prompts, engine.generate([prompt.text for prompt in prompts]), strict=True):
        view = views[prompt.view]
        say(f"  {view.question}  ->  {answer!r}, should be {list(view.golds)}")


def main(argv: list[str] | None = None) -> int:
    """Runs the training a command line asks for; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    path: str | Path = DEFAULT_CONFIG
    is_main = os.environ.get("RANK", "0") == "0"
    if arguments and "=" not in arguments[0]:
        path, *arguments = arguments
    elif is_main:
        print(f"no configuration given: running {DEFAULT_CONFIG}", file=sys.stderr)
    try:
        print(train(load_config(TrainConfig, path, arguments)), file=sys.stdout if is_main else io.StringIO())
    except Preempted as left:
        print(f"train: {left}", file=sys.stderr if is_main else io.StringIO())
        return EXIT_PREEMPTED
    except Exception as error:
        return report("train", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
