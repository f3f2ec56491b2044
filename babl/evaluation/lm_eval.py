"""Shows an engine to lm-evaluation-harness, which knows hundreds of tasks; it is installed apart (pip install lm-eval).

    import lm_eval
    from babl.evaluation.lm_eval import EngineLM
    from babl.generation import Engine

    lm_eval.simple_evaluate(EngineLM(Engine.load("runs/squad/checkpoints/best")), tasks=["lambada_openai"])

Prompts are read as the tasks word them, and nothing is cut: what the model has no room for is an error.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from babl.errors import UserError, did_you_mean
from babl.generation import Engine, GenerationConfig
from babl.text.prompts import prompt_ids

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise UserError(f"lm-evaluation-harness is not installed ({error}); pip install lm-eval") from None


class EngineLM(TemplateLM):
    """A model as lm-evaluation-harness asks for it; where a context ends and a continuation begins, `TemplateLM` says.

    Args:
        engine: Answers.
        batch_size: Texts whose probabilities are computed together.
    """

    def __init__(self, engine: Engine, batch_size: int = 16):
        super().__init__()
        self.engine, self.batch_size = engine, batch_size
        self.backend = "seq2seq" if engine.model.is_encoder_decoder else "causal"
        self._device = engine.device

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self.engine.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or EOS where there is none."""
        bos = self.engine.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the ids of a text, as a prompt's unless `add_special_tokens` is False."""
        if add_special_tokens is False:
            return self.engine.tokenizer.encode(string)
        return prompt_ids([string], self.engine.tokenizer, self.engine.style)[0]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns what is written after each context, up to a stop string of its request."""
        configs = [_config(request.args[1]) for request in requests]
        answers = self.engine.answer([request.args[0] for request in requests], configs, progress=not disable_tqdm)
        return [answer.text for answer in answers]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each whole text, in windows as long as the model's context."""
        totals = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            ids = self.engine.tokenizer.encode(request.args[0])
            longest = self.engine.model.context_length or max(len(ids), 1)
            windows = map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, longest, 1))
            scored = self._loglikelihood_tokens([(None, *window) for window in windows], disable_tqdm=True)
            totals.append(sum(value for value, _ in scored))
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns log-probability, and whether greedy choice writes it, of continuation ids after context ids."""
        model, device = self.engine.model.eval(), self.engine.device
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for texts, prompt, target in requests:
            if not prompt or not target:
                raise UserError(f"of context and continuation {texts}, one has no token of its own")
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]))
        for at in tqdm(range(0, len(order), self.batch_size), desc="log-probabilities", disable=disable_tqdm):
            batch = order[at : at + self.batch_size]
            prompts, targets = ([requests[i][part] for i in batch] for part in (1, 2))
            needed = max(len(prompt) + len(target) - 1 for prompt, target in zip(prompts, targets, strict=True))
            if model.context_length is not None and needed > model.context_length:
                raise UserError(
                    f"context and continuation take {needed} tokens, expected at most {model.context_length}"
                )
            source, mask = _padded(prompts)
            ids, after = (x.to(device) for x in _padded(targets))  # (B, T)
            cache, state = model.prefill(source.to(device), mask.to(device), ids.shape[1])
            states = torch.cat((state[:, None], model.decode(ids[:, :-1], cache)), 1)  # (B, T, C)
            logits = self.engine.logits(states)
            chosen = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
            chosen = chosen.where(after == 1, 0)  # (B, T)
            greedy = ((logits.argmax(-1) == ids) | (after == 0)).all(1)
            for i, log_probs, is_greedy in zip(batch, chosen.tolist(), greedy.tolist(), strict=True):
                for place, value in enumerate(log_probs):
                    self.engine.check_finite(value, place, "continuation")
                results[i] = (sum(log_probs), is_greedy)
        return results


def _padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rows as (B, longest) int64, filled with 0 on the right, and a mask, 0 where they are filled."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return ids, pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], batch_first=True)


def _config(kwargs: dict[str, Any]) -> GenerationConfig:
    """Returns the settings a task asks for, which it names as transformers does."""
    settings = normalize_gen_kwargs(kwargs, default_max_gen_toks=256)
    until, longest = settings.pop("until"), settings.pop("max_gen_toks")
    if settings.pop("do_sample"):
        settings.setdefault("temperature", 1.0)
    known = {field.name for field in fields(GenerationConfig)}
    for name in settings.keys() - known:
        raise UserError(f"a task asks for the generation setting '{name}'{did_you_mean(name, known)}")
    return GenerationConfig(longest, stop_strings=tuple(stop for stop in until if stop), **settings)
