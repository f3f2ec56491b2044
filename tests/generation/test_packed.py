from pathlib import Path

import pytest
import torch

from babl.errors import UserError
from babl.generation import Engine, GenerationConfig
from babl.generation.packed import PackedLinear, pack
from babl.models import from_pretrained, save_pretrained


@pytest.fixture(scope="module")
def packed(reference):
    engine = Engine.load(reference.name_or_path, "cpu")
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    assert isinstance(engine.model.lm_head, PackedLinear)
    return engine


def test_a_loaded_engine_writes_what_transformers_writes(packed, prompts, expected):
    for settings in ({"num_beams": 1}, {"num_beams": 3}):
        answers = packed.answer(prompts, GenerationConfig(max_new_tokens=20, **settings))
        assert [answer.ids for answer in answers] == expected(prompts, max_new_tokens=20, **settings)


def test_scores_are_those_of_the_plain_model(packed, engine, prompts):
    texts = ["the river"] * len(prompts)
    for row, plain in zip(packed.score(prompts, texts), engine.score(prompts, texts), strict=True):
        assert row == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_as_they_are(reference, dtype):
    model = from_pretrained(reference.name_or_path, dtype)
    pack(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_a_packed_model_is_not_saved_over_a_whole_one(packed, reference):
    folder = Path(reference.name_or_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=r"a model without its parameter \S+ cannot be saved"):
        save_pretrained(packed.model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
