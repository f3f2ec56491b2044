import random

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from babl.generation.sampling import GenerationConfig, choose, penalize, probabilities

LOGITS = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 7}, [TopKLogitsWarper(7)]),
        ({"temperature": 1.0, "top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(50), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)],
        ),
    ],
)
def test_distributions_equal_transformers(settings, warpers):
    expected = LOGITS[None]
    for warper in warpers:
        expected = warper(torch.zeros(1, 1, dtype=torch.int64), expected)
    torch.testing.assert_close(probabilities(LOGITS, GenerationConfig(**settings)), expected[0].softmax(-1))


def test_the_repetition_penalty_equals_transformers():
    seen = [3, 5, 5, 9]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), LOGITS[None])[0]
    torch.testing.assert_close(penalize(LOGITS, seen, 1.3), expected)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    config, rng = GenerationConfig(temperature=1.0, top_k=5), random.Random(0)
    drawn = torch.bincount(torch.tensor([choose(LOGITS, config, [], rng) for _ in range(4000)]), minlength=200)
    assert (drawn / 4000 - probabilities(LOGITS, config)).abs().max() < 0.03


def test_without_temperature_the_likeliest_is_taken():
    assert choose(LOGITS, GenerationConfig(), [], random.Random(0)) == int(LOGITS.argmax())
