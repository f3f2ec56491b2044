"""Both arms of the experiment on the embedded data: `babl demo`.

Writes a corpus about an invented world, trains one small model that sees the paragraph and one that does not, scores
both on articles neither has seen, and leaves the models, report.html and report.json in the folder.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from babl.config import save_config
from babl.data.fictional import ENTITY_CANDIDATES, GRADES, chance_exact, fictional_corpus
from babl.data.loader import BatchConfig
from babl.data.sets import DataConfig
from babl.data.squad import load_squad
from babl.errors import UserError
from babl.evaluation.predictions import PromptLimits
from babl.evaluation.report import write_report
from babl.evaluation.runner import evaluate
from babl.generation import Engine
from babl.models.build import ModelConfig
from babl.models.weights import FAMILIES, Family
from babl.scripts.train import TrainConfig
from babl.text import train_tokenizer
from babl.text.prompts import Style, qa_prompt
from babl.training.optimizer import OptimConfig
from babl.training.sections import LoopConfig, RunConfig

DemoArm = Literal["none", "gold"]
TRAIN_ARTICLES, DEV_ARTICLES = 2000, 32
SIDE_BY_SIDE = 1.7  # how much longer a step takes while the other arm trains: two CPUs are often one core
TRIAL_STEPS = 60  # of the gold arm, to learn how fast this machine is
BATCH_TOKENS, MAX_SOURCE, STRIDE = 1536, 128, 16
RESERVE_SECONDS = 40  # for reading, scoring and drawing
SHAPES: dict[Family, dict[str, Any]] = {
    "t5": {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_heads": 8,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "dropout_rate": 0.0,
        "scale_decoder_outputs": False,  # a small model's logits start too small with it
    },
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "bloom": {"hidden_size": 64, "n_layer": 4, "n_head": 8},
}


def run(out: Path, family: Family, minutes: float, seed: int) -> int:
    """Returns 0 once the report stands in `out`; what an earlier demo left there is replaced.

    Args:
        out: The folder.
        family: Of the models.
        minutes: About how long all of it may take.
        seed: Of data, weights and order.
    """
    started = time.perf_counter()
    if minutes < 1:
        raise UserError(f"--minutes is {minutes:g}, expected at least 1")
    _clear(out)
    train_file, dev_file = _write_data(out / "data", seed)
    style: Style = "t5" if FAMILIES[family].model.is_encoder_decoder else "decoder"
    texts = [qa_prompt(e.question, e.context, style) for e in load_squad(train_file)]
    train_tokenizer(texts, 800, out / "tokenizer")

    seconds_per_step = _trial(out, family, seed)
    left = 60 * minutes - (time.perf_counter() - started) - RESERVE_SECONDS
    steps = max(TRIAL_STEPS, int(left / (SIDE_BY_SIDE * seconds_per_step)))
    print(f"{1000 * seconds_per_step:.0f} ms a step: {steps:,} steps for each arm, side by side", file=sys.stderr)
    trained = _train_side_by_side(out, family, steps, seed)

    arms: dict[str, Any] = {}
    losses: dict[str, list[float]] = {}
    dev = load_squad(dev_file)
    for arm, seconds in trained.items():
        folder = out / f"model-{arm}"
        shutil.copytree(out / arm / "checkpoints" / "latest", folder)
        result = evaluate(Engine.load(folder), dev, arm, PromptLimits(MAX_SOURCE, STRIDE, 16))
        result.save(out / f"answers-{arm}")
        lines = [json.loads(line) for line in (out / arm / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses[arm] = [line["loss"] for line in lines if "loss" in line]
        arms[arm] = {
            "exact": result.metrics["exact_match"],
            "f1": result.metrics["f1"],
            "interval": result.metrics["exact_interval"],
            "grades": {grade: result.metrics["grades"][grade] for grade in GRADES},
            "model": str(folder),
            "steps": steps,
            "seconds": seconds,
        }
    golds = [(example.grade, example.answers[0].text) for example in dev]
    report = {
        "family": family,
        "arms": arms,
        "chance_exact": chance_exact(text for _, text in golds),
        "chance_grades": {grade: chance_exact(text for g, text in golds if g == grade) for grade in GRADES},
        "between_candidates": 100 / ENTITY_CANDIDATES,
        "difference": arms["gold"]["exact"] - arms["none"]["exact"],
        "train_questions": len(texts),
        "dev_questions": len(dev),
        "articles": DEV_ARTICLES,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    write_report(report, losses, out)
    _print_table(report)
    example = next(e for e in dev if e.grade == "type")
    print(f"""
{out / "report.html"} shows this with pictures. Now ask the model that reads:

  babl query {arms["gold"]["model"]} "{example.question}" \\
    --context "{example.context}"
  babl evaluate {arms["gold"]["model"]} {dev_file} --context none
  babl demo --out runs/demo30 --minutes 30 --family {family}""")
    return 0


def _trial(out: Path, family: Family, seed: int) -> float:
    """Returns the seconds that a step of the gold arm takes on this machine."""
    code = _start(_config(out, family, "trial", "gold", TRIAL_STEPS, seed)).wait()
    if code:
        raise RuntimeError(f"the trial run ended with exit code {code}")
    lines = (out / "trial" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    seconds = [BATCH_TOKENS * (1 - line["padding_fraction"]) / line["tokens_per_second"] for line in steps]
    shutil.rmtree(out / "trial")
    return statistics.median(seconds)


def _train_side_by_side(out: Path, family: Family, steps: int, seed: int) -> dict[DemoArm, float]:
    """Returns the seconds each arm took; the gold arm's progress is shown, the other's is in none.log."""
    begun = time.perf_counter()
    seconds: dict[DemoArm, float] = {}
    with (out / "none.log").open("w", encoding="utf-8") as log:
        running: dict[DemoArm, subprocess.Popen] = {
            "none": _start(_config(out, family, "none", "none", steps, seed), log),
            "gold": _start(_config(out, family, "gold", "gold", steps, seed)),
        }
        try:
            while len(seconds) < len(running):
                time.sleep(0.2)
                for arm, process in running.items():
                    if arm not in seconds and process.poll() is not None:
                        seconds[arm] = round(time.perf_counter() - begun, 1)
                        if process.returncode:
                            raise RuntimeError(f"training arm {arm} ended with exit code {process.returncode}")
        finally:
            for process in running.values():
                process.terminate()
                process.wait()
    return {arm: seconds[arm] for arm in running}


def _start(config: TrainConfig, log: TextIO | None = None) -> subprocess.Popen:
    """Returns the running training, in a process and on a core of its own; it shows its progress where log is None."""
    file = Path(config.run.dir) / f"{config.run.name}.toml"
    save_config(config, file)
    command = [sys.executable, "-m", "babl.scripts.train", str(file)]
    # Steps this small gain little from a second thread, and lose all of it where another process wants the core.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment)


def _config(out: Path, family: Family, name: str, arm: DemoArm, steps: int, seed: int) -> TrainConfig:
    return TrainConfig(
        RunConfig(name=name, dir=str(out), seed=seed),
        ModelConfig(family=family, shape=SHAPES[family], tokenizer=str(out / "tokenizer")),
        DataConfig(str(out / "data/train.json"), str(out / "data/dev.json"), arm, MAX_SOURCE, STRIDE),
        BatchConfig(tokens=BATCH_TOKENS if arm == "gold" else BATCH_TOKENS * 2 // 5),
        OptimConfig(lr=1e-3, schedule="trapezoid", warmup_steps=min(100, steps // 4)),
        LoopConfig(steps=steps, keep_last=1),
    )


def _write_data(folder: Path, seed: int) -> list[Path]:
    """Returns the files of the training and the dev set."""
    folder.mkdir()
    files = [folder / "train.json", folder / "dev.json"]
    for file, data in zip(files, fictional_corpus(TRAIN_ARTICLES, DEV_ARTICLES, seed), strict=True):
        file.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return files


def _print_table(report: dict[str, Any]) -> None:
    print(f"\n{'arm':<8}{'EM':>7}  {'EM, 95 % interval':^17}{'F1':>7}" + "".join(f"{f'EM {g}':>11}" for g in GRADES))
    for name, arm in report["arms"].items():
        interval = "{:.1f} to {:.1f}".format(*arm["interval"]) if arm["interval"] else "–"  # – where articles agree
        grades = "".join(f"{arm['grades'][grade]:>11.1f}" for grade in GRADES)
        print(f"{name:<8}{arm['exact']:>7.1f}  {interval:^17}{arm['f1']:>7.1f}{grades}")
    chance = "".join(f"{report['chance_grades'][grade]:>11.1f}" for grade in GRADES)
    print(f"{'chance':<8}{report['chance_exact']:>7.1f}  {'':^17}{'':>7}{chance}")
    print(
        f"{report['dev_questions']} questions of {report['articles']} unseen articles; {report['seconds']:.0f} seconds"
    )


def _clear(out: Path) -> None:
    """Nothing of an earlier demo is in the folder, and nothing else was touched."""
    if out.exists() and not (out / "data" / "train.json").exists() and any(out.iterdir()):
        raise UserError(f"--out: {out} holds something that is not a demo; choose an empty or a new folder")
    try:
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror})") from None
