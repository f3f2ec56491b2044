"""Greedy writing beside transformers, whose tokens must be the same."""

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch

from babl.generation import Engine, GenerationConfig
from babl.generation.sampling import LOOKUP_TOKENS
from babl.scripts.bench.turns import ratios, timed

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
BATCHES = (1, 16)  # 1, or 16 prompts of a quarter of the length to the whole


def add(jobs: Any) -> None:
    """Adds the job."""
    job = jobs.add_parser("generate", help="greedy writing beside transformers")
    job.add_argument("--family", action="append", choices=WORK, help="one only; may be repeated")
    job.add_argument("--repeats", type=int, default=5, metavar="N")
    job.add_argument("--compile", action="store_true", help="let transformers compile its step, too (minutes)")
    job.set_defaults(run=lambda a: generate(a.family or list(WORK), a.repeats, a.compile))


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
                for row in ratios(seconds, "babl"):
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
    return timed(runs, repeats)
