"""The openai client before models of each family."""

import openai
import pytest

from babl.generation import Engine

FAMILIES = ("t5", "llama", "bloom")


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_model):
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        make_model(family, folder / family, 5)  # a seed whose T5 writes whole characters
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


@pytest.mark.parametrize("family", FAMILIES)
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
