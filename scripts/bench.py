"""Measures Babl beside what else does the same work: `python scripts/bench.py JOB`.

    python scripts/bench.py generate --compile --out benchmarks/generate-cpu.json
    python scripts/bench.py lookup MODEL DATA.json
    python scripts/bench.py load
    python scripts/bench.py backends --out benchmarks/backends-cpu.json
    python scripts/bench.py overlap --out benchmarks/overlap-cpu.json
    python scripts/bench.py score --out benchmarks/score-cpu.json
    python scripts/bench.py kernels --table --out benchmarks/kernels-gpu.json
    python scripts/bench.py gpu --out benchmarks/training-gpu.json
    python scripts/bench.py compile --out benchmarks/kernels-compiled.json

What is compared runs in turn, A B A B, so that the moods of a machine fall on both; a ratio is the median over the
turns. Tables are printed as Markdown; `--out` keeps every single figure, with machine and versions. `generate` compares
with transformers, which the extra `dev` installs.
"""

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from tqdm import tqdm

from babl import kernel_choice, ops
from babl.data.collate import Feature, collate, make_prompts
from babl.data.contexts import build_views
from babl.data.fictional import SYLLABLES
from babl.data.loader import dropout_keys
from babl.data.squad import Answer, Example, load_squad, to_squad
from babl.distributed.backend import DistributedConfig, make_backend
from babl.distributed.env import world
from babl.errors import UserError
from babl.evaluation.runner import longest_prompt
from babl.evaluation.squad import Version
from babl.evaluation.squad import score as official_score
from babl.generation import Engine, GenerationConfig
from babl.generation.packed import pack
from babl.generation.sampling import LOOKUP_TOKENS
from babl.models import from_pretrained, save_pretrained
from babl.models.llama import Llama, LlamaConfig
from babl.models.t5 import T5, T5Config
from babl.models.weights import describe
from babl.scripts import bench_gpu, bench_kernels
from babl.text.normalize import normalize_answer
from babl.training.loss import token_loss
from babl.training.optimizer import OptimConfig, make_optimizer

WORK = {  # family: transformers' shape, prompt tokens, new tokens
    "t5": (
        {"d_model": 512, "d_ff": 2048, "d_kv": 64, "num_layers": 6, "num_decoder_layers": 6, "num_heads": 8},
        200,
        16,
    ),
    "llama": (
        {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
        },
        64,
        128,
    ),
    "bloom": ({"hidden_size": 512, "n_layer": 8, "n_head": 8}, 64, 64),
}
VOCABULARY = 32_000
Run = Callable[[], list[tuple[int, ...]]]  # writes, and returns the ids of each row
BACKENDS: tuple[str, ...] = get_args(get_type_hints(DistributedConfig)["backend"])
RANKS, ACCUMULATION = 2, 2
RANK_EXAMPLES, SOURCE, TARGET = 4, 128, 16  # of a rank's micro-batch: how many, and tokens of each
WARM_UP = 2  # steps: the first makes the optimizer's state
BATCHES = (1, 16)  # 1, or 16 prompts of a quarter of the length to the whole


def generate(families: Sequence[str], repeats: int, compiled: bool) -> list[dict[str, Any]]:
    """Returns a row for each family and batch size: seconds of greedy writing, here and by transformers.

    Weights are random, of the shapes in `WORK`, the same for all; every token must be, too.

    Raises:
        RuntimeError: Somebody wrote another token.
    """
    rows = []
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            reference = _random_model(family, Path(folder))
            engine = Engine.load(folder)
            _, longest, new = WORK[family]
            for batch in BATCHES:
                prompts = _prompts(engine, longest, batch)
                rivals = _rivals(reference, engine, prompts, new, compiled)
                runs: dict[str, Run] = {"babl": partial(_babl, engine, prompts, new), **rivals}
                seconds = _in_turn(runs, repeats)
                for row in _ratios(seconds, "babl"):
                    rows.append({"model": family, "batch": batch, "prompt": longest, "new": new} | row)
    return rows


def _babl(engine: Engine, prompts: list[list[int]], new: int) -> list[tuple[int, ...]]:
    # As the commands do: questions look up, which only T5 is asked here; a text is just continued.
    lookup = LOOKUP_TOKENS if engine.model.is_encoder_decoder else 0
    config = GenerationConfig(max_new_tokens=new, prompt_lookup_num_tokens=lookup)
    return [answer.ids for answer in engine.answer(prompts, config)]


def _random_model(family: str, folder: Path) -> Any:
    """Returns transformers' model; the folder holds the same one, and a tokenizer of as many ids."""
    import transformers

    torch.manual_seed(0)
    config, model = {
        "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "bloom": (transformers.BloomConfig, transformers.BloomForCausalLM),
    }[family]
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    special |= {"decoder_start_token_id": 0} if family == "t5" else {}
    reference = model(config(vocab_size=VOCABULARY, **special, **WORK[family][0])).eval()
    reference.save_pretrained(folder)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "w0", "eos_token": "w1"}')
    return reference


def _prompts(engine: Engine, longest: int, batch: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [longest * (batch + 3 * i) // (4 * batch - 3) if batch > 1 else longest for i in range(batch)]
    end = [engine.tokenizer.eos_id] if engine.model.is_encoder_decoder else []
    draw = lambda n: torch.randint(4, VOCABULARY, (n - len(end),), generator=generator).tolist()  # noqa: E731
    return [draw(length) + end for length in lengths]


def _rivals(reference: Any, engine: Engine, prompts: list[list[int]], new: int, compiled: bool) -> dict[str, Run]:
    """Returns ways in which transformers writes the same, by name; those it cannot go are said on stderr."""
    width = max(map(len, prompts))
    after = engine.model.is_encoder_decoder  # where the padding stands
    pads = [[0] * (width - len(prompt)) for prompt in prompts]
    ids = torch.tensor([p + pad if after else pad + p for p, pad in zip(prompts, pads, strict=True)])
    ones = [[1] * len(prompt) for prompt in prompts]
    mask = torch.tensor([one + pad if after else pad + one for one, pad in zip(ones, pads, strict=True)])
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    ways: dict[str, dict[str, Any]] = {
        "transformers": {},
        "transformers, static cache": {"cache_implementation": "static", "disable_compile": True},
    }
    if compiled:
        ways["transformers, static cache, compiled"] = {"cache_implementation": "static"}
    plain, fast = reference.forward, torch.compile(reference.forward, dynamic=False)

    def run(name: str) -> list[tuple[int, ...]]:
        reference.forward = fast if name.endswith("compiled") else plain
        with torch.no_grad():
            out = reference.generate(ids, **settings, **ways[name])
        return [tuple(row) for row in out[:, 1 if after else width :].tolist()]

    possible: dict[str, Run] = {}
    for name in ways:
        try:
            run(name)
            possible[name] = partial(run, name)
        except Exception as error:  # whatever transformers raises for a model it cannot serve in this way
            print(f"{name}: not possible ({str(error).splitlines()[0][:120]})", file=sys.stderr)
    return possible


def _in_turn(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each run, repeated in turn; all must give the same."""
    results = {name: run() for name, run in runs.items()}  # the first time is not counted
    first = next(iter(results.values()))
    different = [name for name, result in results.items() if result != first]
    if different:
        raise RuntimeError(f"{different[0]} wrote other tokens")
    return _timed(runs, repeats)


def _timed(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def _ratios(seconds: dict[str, list[float]], ours: str) -> Iterable[dict[str, Any]]:
    for name, times in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(seconds[ours], times, strict=True))
        yield {"by": name, "seconds": statistics.median(times), "ratio": ratio, "all_seconds": times}


def lookup(model: str, data: str, limit: int | None, together: int) -> list[dict[str, Any]]:
    """Returns one row: what prompt lookup saves where so many questions are asked together, and what it changes."""
    engine = Engine.load(model)
    configs = [GenerationConfig(32, prompt_lookup_num_tokens=number) for number in (0, LOOKUP_TOKENS)]
    longest = longest_prompt(engine, 32)
    views, _ = build_views(load_squad(data)[:limit], "gold")
    prompts, _ = make_prompts(views, engine.tokenizer, longest, longest // 4, engine.style)
    same, tokens, steps, seconds = 0, 0, [0, 0], [0.0, 0.0]
    for at in range(0, len(prompts), together):
        answers = []
        for i, config in enumerate(configs):
            begun = time.perf_counter()
            answers.append(engine.answer([prompt.text for prompt in prompts[at : at + together]], config))
            seconds[i] += time.perf_counter() - begun
            steps[i] += sum(answer.steps for answer in answers[i])
        same += sum(a.ids == b.ids for a, b in zip(*answers, strict=True))
        tokens += sum(len(answer.ids) for answer in answers[0])
    return [
        {
            "model": model,
            "together": together,
            "prompts": len(prompts),
            "identical": same,
            "tokens": tokens,
            "steps": steps[0],
            "steps with lookup": steps[1],
            "fewer": steps[0] / steps[1],
            "seconds": seconds[0],
            "seconds with lookup": seconds[1],
        }
    ]


def backends(repeats: int, steps: int) -> list[dict[str, Any]]:
    """Returns a row for each backend: milliseconds a step, beside plain DDP, peak memory of a rank, time to start."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in BACKENDS}
    order = [name for _ in range(repeats) for name in BACKENDS]
    for name in tqdm(order, desc="turns", leave=False):
        turns[name].append(_turn(name, steps))
    rows = []
    for name, found in turns.items():
        ratios = [turn["ms"] / ddp["ms"] for turn, ddp in zip(found, turns["ddp"], strict=True)]
        row = {"backend": name, "ms per step": statistics.median(turn["ms"] for turn in found)}
        row |= {"beside ddp": statistics.median(ratios), "peak MiB": statistics.median(t["MiB"] for t in found)}
        rows.append(row | {"start s": statistics.median(turn["start"] for turn in found), "turns": found})
    return rows


def _turn(name: str, steps: int) -> dict[str, Any]:
    """Returns what rank 0 of a fresh world has measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "turn.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
        command = [*torchrun, __file__, "rank-of", name, "--steps", str(steps), "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.loads(out.read_text(encoding="utf-8"))


def _rank(name: str, steps: int, out: Path) -> None:
    """One rank of a world trains; rank 0 writes the median of its steps."""
    torch.set_flush_denormal(True)
    with world() as me:
        begun = time.perf_counter()
        model = T5(T5Config())
        model.init_weights(torch.Generator().manual_seed(0))
        backend = make_backend(DistributedConfig(backend=name), me, bf16=False)  # type: ignore[arg-type]
        backend.setup(model.train(), partial(make_optimizer, cfg=OptimConfig()))
        me.barrier()
        start = time.perf_counter() - begun
        generator = torch.Generator().manual_seed(me.rank)
        draw = partial(torch.randint, 3, model.config.vocab_size, generator=generator)
        features = [Feature(str(i), draw((SOURCE,)).tolist(), draw((TARGET,)).tolist()) for i in range(RANK_EXAMPLES)]
        times = []
        for step in range(WARM_UP + steps):
            me.barrier()
            begun = time.perf_counter()
            for part in range(ACCUMULATION):
                batch = collate(features, 0, dropout_keys(0, step, range(RANK_EXAMPLES)))
                with backend.microbatch(last=part == ACCUMULATION - 1):
                    loss = token_loss(backend.model, batch) / (me.size * ACCUMULATION * batch.targets)
                    backend.backward(loss)
            backend.step(1e-4, 1.0)
            times.append(time.perf_counter() - begun)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if me.is_main:
            turn = {"ms": 1000 * statistics.median(times[WARM_UP:]), "MiB": peak, "start": start, "steps": times}
            out.write_text(json.dumps(turn), encoding="utf-8")


def dropout(repeats: int) -> list[dict[str, Any]]:
    """Returns a row for each shape: milliseconds of dropout that belongs to the example, beside torch's own."""
    rows = []
    for shape in ((8, 200, 512), (8, 200, 2048), (8, 8, 200, 200)):  # T5-small's states, feed-forward, attention
        x, keys = torch.randn(shape), torch.arange(8)
        runs = {"babl": partial(ops.dropout, x, 0.1, keys, 3), "torch": partial(F.dropout, x, 0.1)}
        for row in _ratios(_timed(runs, repeats), "babl"):
            rows.append({"shape": " x ".join(map(str, shape))} | row)
    return rows


def score(questions: int, repeats: int) -> list[dict[str, Any]]:
    """Returns a row for each version and kind of text: seconds of scoring, here and by the official scripts' algorithm.

    Raises:
        RuntimeError: A metric differs.
    """
    rows = []
    for version in get_args(Version):
        for texts in ("as in SQuAD", "none twice"):
            data, predictions = _annotated(questions, version, unique=texts == "none twice")
            runs = {
                "babl": partial(_fresh_score, data, predictions, version),
                "official algorithm": partial(_plain_score, data, predictions, version),
            }
            results = [run() for run in runs.values()]
            if results[0] != results[1]:
                raise RuntimeError(f"version {version}, {texts}: {results[0]} differs from {results[1]}")
            for row in _ratios(_timed(runs, repeats), "babl"):
                rows.append({"version": version, "texts": texts, "questions": questions} | row)
    return rows


def _fresh_score(data: dict[str, Any], predictions: dict[str, str], version: Version) -> dict[str, Any]:
    normalize_answer.cache_clear()  # as a new process begins
    return official_score(data, predictions, version=version)


def _annotated(questions: int, version: str, unique: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns a data set with one to five golds a question, and predictions: most right, some near, some wrong.

    Where `unique`, no text stands twice, though texts normalise to the same; in version 2.0 every second question has
    no answer.
    """
    rng = random.Random(0)
    words = ["of", "in", "the", "and", *map(str, range(1900, 1950))]
    words += ["".join(rng.choices(SYLLABLES, k=3)).capitalize() for _ in range(5000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    qas, predictions = [], {}
    for number in range(questions):
        right, wrong = (rng.choices(words, weights, k=rng.choice((1, 1, 2, 2, 3, 5))) for _ in range(2))
        mark = f" {number}" if unique else ""
        same = [form.format(" ".join(right) + mark) for form in ("{}", "the {}", "{}.", "({})", "{},", '"{}"')]
        near = " ".join(right[:2] + wrong[:1]) + mark + mark
        golds = rng.sample(same[:5], rng.randint(1, 5)) if unique else rng.choices([*same[:2], near], (8, 1, 1), k=3)
        predictions[str(number)] = rng.choices([same[5], near, " ".join(wrong) + mark * 3, ""], (14, 3, 2, 1))[0]
        if version == "2.0" and number % 2:
            golds = []
        qas.append({"id": str(number), "answers": [{"text": gold, "answer_start": 0} for gold in golds]})
    articles = [{"title": str(at), "paragraphs": [{"qas": qas[at : at + 200]}]} for at in range(0, questions, 200)]
    return {"version": version, "data": articles}, predictions


def _plain_score(dataset: dict[str, Any], predictions: dict[str, str], version: Version) -> dict[str, Any]:
    """Returns the metrics as the scripts published with SQuAD compute them, text by text, nothing kept."""
    exact, overlap, answerable = {}, {}, {}
    for article in dataset["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                golds = [answer["text"] for answer in qa["answers"]]
                answerable[qa["id"]] = bool(golds)
                if version == "2.0":
                    golds = [gold for gold in golds if _plain_normal(gold)] or [""]
                prediction = predictions[qa["id"]]
                exact[qa["id"]] = max(float(_plain_normal(gold) == _plain_normal(prediction)) for gold in golds)
                overlap[qa["id"]] = max(_plain_f1(gold, prediction, version) for gold in golds)

    def means(ids: list[str], prefix: str = "") -> dict[str, Any]:
        name = "exact_match" if version == "1.1" else f"{prefix}exact"
        return {
            name: 100.0 * sum(exact[i] for i in ids) / len(ids),
            f"{prefix}f1": 100.0 * sum(overlap[i] for i in ids) / len(ids),
            f"{prefix}total": len(ids),
        }

    if version == "1.1":
        return means(list(exact))
    has, has_not = ([i for i in exact if answerable[i] is wanted] for wanted in (True, False))
    return means(list(exact)) | means(has, "HasAns_") | means(has_not, "NoAns_")


def _plain_normal(text: str) -> str:
    punctuation = set(string.punctuation)
    bare = "".join(character for character in text.lower() if character not in punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _plain_f1(gold: str, prediction: str, version: str) -> float:
    golden, predicted = _plain_normal(gold).split(), _plain_normal(prediction).split()
    if version == "2.0" and not (golden and predicted):
        return float(golden == predicted)
    same = sum((Counter(golden) & Counter(predicted)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(golden)
    return 2 * precision * recall / (precision + recall)


def load(mebibytes: int) -> list[dict[str, Any]]:
    """Returns a row for each way to load a LLaMA of that size: memory taken above the interpreter with torch in it."""
    layers = max(1, round((mebibytes - 250) / 49))
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_hidden_layers=layers)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            path = Path(folder) / dtype
            save_pretrained(Llama(config).to(getattr(torch, dtype)), path)
            weights = 4 * describe(path)["parameters"] / 2**20
            for packed in (False, True):
                with multiprocessing.get_context("spawn").Pool(1) as fresh:
                    peak, seconds = fresh.apply(_load_once, (path, packed))
                row = {"folder": dtype, "packed": packed, "weights MiB": weights, "peak MiB": peak}
                rows.append(row | {"ratio": peak / weights, "seconds": seconds})
    return rows


def _load_once(folder: Path, packed: bool) -> tuple[float, float]:
    """Returns the most MiB held on top of what was held before, and seconds."""
    before, begun = _status("VmRSS"), time.perf_counter()
    model = from_pretrained(folder)
    if packed:
        pack(model)
    seconds = time.perf_counter() - begun
    for parameter in model.parameters():
        parameter.sum()  # what is mapped counts once it is read
    return _status("VmHWM") - before, seconds


def _status(key: str, process: int | str = "self") -> float:
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def overlap(train: int, test: int, documents: int) -> list[dict[str, Any]]:
    """Returns a row for each made-up set: seconds and memory of `babl overlap`, a process of its own.

    In a "plain" set each question has words of its own; of "forms", 12 wordings serve for all, and half a context is
    one of 12 texts. One question of test in 20 and one context in 20 stand in train.
    """
    rows = []
    for kind in ("plain", "forms"):
        for shards in (0, documents):
            with tempfile.TemporaryDirectory() as folder:
                names = ("train.json", "dev.json", "corpus.txt")
                paths = [str(Path(folder) / name) for name in names]
                _made_up(kind, train, test, shards, *map(Path, paths))
                corpus = ["--corpus", paths[2]] if shards else []
                command = [sys.executable, "-m", "babl.cli", "overlap", *paths[:2], *corpus, "--json"]
                seconds, peak = _watched(command)
            row = {"set": kind, "train": train, "test": test, "corpus documents": shards}
            rows.append(row | {"seconds": seconds, "peak MiB": peak})
    return rows


def _made_up(kind: str, train: int, test: int, documents: int, *paths: Path) -> None:
    """The paths hold a training set, a test set and a corpus, of Zipf's words."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlu"))
    vocabulary = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, 60_000)]
    vocabulary = [word.capitalize() if i > 2000 else word for i, word in enumerate(vocabulary)]  # rare ones are names
    weights = np.cumsum(1 / np.arange(3, len(vocabulary) + 3))

    def draw(count: int) -> list[str]:
        return [vocabulary[i] for i in np.searchsorted(weights, weights[-1] * rng.random(count))]

    def one(rows: Sequence[Any]) -> Any:
        return rows[int(rng.integers(len(rows)))]

    wordings, texts = [draw(8) for _ in range(12)], [draw(60) for _ in range(12)]

    def context() -> str:
        return " ".join(one(texts) + draw(60) if kind == "forms" else draw(120))

    def question() -> str:
        return " ".join(one(wordings) + draw(2) if kind == "forms" else draw(10)) + "?"

    def examples(name: str, count: int, seen: Sequence[Example]) -> Iterator[Example]:
        for i in range(count):
            if i % 5 == 0:
                said = one(seen).context if seen and rng.random() < 0.05 else context()
            asked = one(seen).question if seen and rng.random() < 0.05 else question()
            start = said.index(" ", int(rng.integers(len(said) // 2))) + 1
            end = said.index(" ", start)
            yield Example(f"{name}{i}", f"{name}{i // 100}", asked, said, (Answer(said[start:end], start),))

    known = list(examples("train", train, ()))
    for path, part in ((paths[0], known), (paths[1], list(examples("test", test, known)))):
        path.write_text(json.dumps(to_squad(part)), encoding="utf-8")
    with paths[2].open("w", encoding="utf-8") as file:
        file.writelines(context() + "\n" for _ in range(documents))


def _watched(command: Sequence[str]) -> tuple[float, float]:
    """Returns the seconds a command takes, and the most MiB it holds."""
    begun, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(StopIteration, OSError):  # it has just ended
            peak = max(peak, _status("VmHWM", process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - begun, peak


def kernels(repeats: int, write_table: bool, operations: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the rows of `bench_kernels.measure`; kernels are chosen by them from then on, where asked."""
    kernel_choice.use_kernels("off")  # what is compared with is plain torch
    rows = bench_kernels.measure(repeats, operations=operations)
    if write_table:
        (gpu, found), *_ = bench_kernels.table(rows, torch.cuda.get_device_name()).items()
        kept = {
            name: of
            for name, of in kernel_choice.MEASURED.get(gpu, {}).items()
            if operations and name not in operations
        }
        measured = kernel_choice.MEASURED | {gpu: kept | found}
        kernel_choice.MEASURED_FILE.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints the table a command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0] if __doc__ else None)
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    job = jobs.add_parser("generate", help="greedy writing beside transformers")
    job.add_argument("--family", action="append", choices=WORK, help="one only; may be repeated")
    job.add_argument("--repeats", type=int, default=5, metavar="N")
    job.add_argument("--compile", action="store_true", help="let transformers compile its step, too (minutes)")
    job.set_defaults(run=lambda a: generate(a.family or list(WORK), a.repeats, a.compile))
    job = jobs.add_parser("lookup", help="steps and seconds of answers with and without prompt lookup")
    job.add_argument("model", metavar="MODEL")
    job.add_argument("data", metavar="DATA.json")
    job.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
    job.add_argument("--together", type=int, default=1, metavar="N", help="asked in one batch (default 1)")
    job.set_defaults(run=lambda a: lookup(a.model, a.data, a.limit, a.together))
    job = jobs.add_parser("load", help="memory taken by loading a model")
    job.add_argument("--mebibytes", type=int, default=1024, metavar="N", help="of weights in fp32 (default 1024)")
    job.set_defaults(run=lambda a: load(a.mebibytes))
    job = jobs.add_parser("dropout", help="dropout that belongs to the example beside torch's")
    job.add_argument("--repeats", type=int, default=50, metavar="N")
    job.set_defaults(run=lambda a: dropout(a.repeats))
    job = jobs.add_parser("score", help="the official metrics of predictions beside the official algorithm")
    job.add_argument("--questions", type=int, default=100_000, metavar="N")
    job.add_argument("--repeats", type=int, default=5, metavar="N")
    job.set_defaults(run=lambda a: score(a.questions, a.repeats))
    job = jobs.add_parser("backends", help="a training step of each backend beside DDP, on two ranks of CPUs")
    job.add_argument("--repeats", type=int, default=3, metavar="N")
    job.add_argument("--steps", type=int, default=6, metavar="N", help="timed ones of a turn")
    job.set_defaults(run=lambda a: backends(a.repeats, a.steps))
    job = jobs.add_parser("overlap", help="time and memory of looking for overlap, on made-up sets")
    job.add_argument("--train", type=int, default=100_000, metavar="N", help="questions (default 100000)")
    job.add_argument("--test", type=int, default=10_000, metavar="N", help="questions (default 10000)")
    job.add_argument("--documents", type=int, default=20_000, metavar="N", help="of the corpus (default 20000)")
    job.set_defaults(run=lambda a: overlap(a.train, a.test, a.documents))
    job = jobs.add_parser("kernels", help="Triton kernels beside what torch has, on a GPU")
    job.add_argument("--repeats", type=int, default=3, metavar="N")
    job.add_argument("--table", action="store_true", help="write kernels/measured.json, by which kernels are chosen")
    job.add_argument("--operation", action="append", default=[], metavar="NAME", help="one only; may be repeated")
    job.set_defaults(run=lambda a: kernels(a.repeats, a.table, a.operation))
    job = jobs.add_parser("gpu", help="training steps of published shapes on a GPU, without and with kernels")
    job.add_argument("--model", action="append", choices=bench_gpu.WORK, help="one only; may be repeated")
    job.add_argument("--steps", type=int, default=10, metavar="N", help="timed ones of each way (default 10)")
    job.set_defaults(run=lambda a: bench_gpu.measure(a.model or list(bench_gpu.WORK), a.steps))
    job = jobs.add_parser(
        "compile", help="registers and memory of the kernels, compiled for GPUs that need not be here"
    )
    job.add_argument("--sm", type=int, action="append", choices=(80, 90), help="one only; may be repeated")
    job.set_defaults(run=lambda a: [row for sm in a.sm or (80, 90) for row in bench_kernels.compile_ahead(sm)])
    job = jobs.add_parser("rank-of")  # what `backends` starts
    job.add_argument("backend", choices=BACKENDS)
    job.add_argument("--steps", type=int)
    job.set_defaults(run=lambda a: _rank(a.backend, a.steps, a.out))
    for job in jobs.choices.values():
        job.add_argument("--out", type=Path, metavar="FILE.json", help="keep every figure there")
    args = parser.parse_args(argv)
    try:
        rows = args.run(args)
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if rows is None:
        return 0
    print(_markdown(rows))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def _markdown(rows: list[dict[str, Any]]) -> str:
    shown = [{key: value for key, value in row.items() if not isinstance(value, list)} for row in rows]
    lines = [list(shown[0]), ["---"] * len(shown[0])]
    lines += [[_number(value) for value in row.values()] for row in shown]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine() -> dict[str, Any]:
    """Returns what figures were taken on: processors, devices, versions."""
    installed = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    packages = ("torch", "triton", "transformers", "deepspeed", "tokenizers", "safetensors", "Django", "uvicorn")
    versions = {name: installed[name] for name in packages if name in installed}
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    facts = {"cpu": cpu.split(":")[1].strip(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return (
        facts
        | {"isa": torch.backends.cpu.get_cpu_capability(), "gpu": gpu, "python": platform.python_version()}
        | versions
    )


if __name__ == "__main__":
    sys.exit(main())
