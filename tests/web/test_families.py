"""The openai client before models of each family."""

import openai
import pytest
import torch

from babl.generation import Engine
from babl.models.build import ModelConfig, build_model
from babl.models.weights import save_pretrained
from babl.text import train_tokenizer

WORDS = "the small fox reads a long book about old rivers and the town where nobody asks who answers what"
SHAPES = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 6},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for family, shape in SHAPES.items():
        train_tokenizer([WORDS] * 4, 330, folder / family)
        chosen = ModelConfig(family=family, shape=shape, tokenizer=str(folder / family))
        model, _ = build_model(chosen, folder / family, 5)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():  # sharp enough that no two tokens are equally likely
                parameter.add_(torch.randn_like(parameter) * 0.15)
        save_pretrained(model, folder / family)
    return folder


@pytest.fixture(scope="module")
def client(models, serving, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("served"), {"BABL_SCRIPTED": "0"}, models) as server:
        key = server.person().call("POST", "/api/keys", json={"name": "tests"})["key"]
        with openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0) as client:
            yield client


def streamed(create, **settings):
    """Returns the text and the number of pieces it came in."""
    pieces = []
    for chunk in create(stream=True, **settings):
        choice = chunk.choices[0]
        pieces.append((choice.delta.content if hasattr(choice, "delta") else choice.text) or "")
    return "".join(pieces), sum(map(bool, pieces))


@pytest.mark.parametrize("family", SHAPES)
def test_a_model_of_each_family_streams_and_honours_a_temperature_of_0(client, models, family):
    assert family in [model.id for model in client.models.list()]
    prompt = "nobody asks the fox"
    text = client.completions.create
    settings = {"model": family, "prompt": prompt, "max_tokens": 12}
    (greedy,) = Engine.load(models / family, "cpu").generate([prompt], max_new_tokens=12)
    whole = text(**settings, temperature=0).choices[0].text
    assert whole == greedy, "what the engine writes by taking the likeliest token"
    assert {streamed(text, **settings, temperature=0, seed=seed)[0] for seed in (1, 2)} == {whole}
    longer, pieces = streamed(text, **settings | {"max_tokens": 150}, temperature=0)
    assert longer.startswith(whole.rstrip("\ufffd")) and pieces > 1
    drawn = {streamed(text, **settings, temperature=1.5, seed=seed)[0] for seed in (1, 1, 2, 3)}
    assert 2 <= len(drawn) <= 3, "a draw is repeated by its seed"

    chat = client.chat.completions.create
    settings = {"model": family, "messages": [{"role": "user", "content": prompt}], "max_tokens": 12}
    whole = chat(**settings, temperature=0).choices[0].message.content
    assert {streamed(chat, **settings, temperature=0, seed=seed)[0] for seed in (1, 2)} == {whole}
