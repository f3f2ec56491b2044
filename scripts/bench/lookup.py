"""What prompt lookup saves, and what it changes."""

import time
from typing import Any

from babl.data.collate import make_prompts
from babl.data.contexts import build_views
from babl.data.squad import load_squad
from babl.evaluation.runner import longest_prompt
from babl.generation import Engine, GenerationConfig
from babl.generation.sampling import LOOKUP_TOKENS


def add(jobs: Any) -> None:
    """Adds the job."""
    job = jobs.add_parser("lookup", help="steps and seconds of answers with and without prompt lookup")
    job.add_argument("model", metavar="MODEL")
    job.add_argument("data", metavar="DATA.json")
    job.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
    job.add_argument("--together", type=int, default=1, metavar="N", help="asked in one batch (default 1)")
    job.set_defaults(run=lambda a: lookup(a.model, a.data, a.limit, a.together))


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
