"""The openai client before models of each family."""

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

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


def log_probs(folder, ids):
    """transformers' log-probabilities of the token after each, (len(ids), V)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("by_ids", [True, False])
def test_tokens_of_the_prompt_and_of_the_answer_have_transformers_log_probabilities(client, models, family, by_ids):
    """As lm-evaluation-harness asks: the prompt echoed, one token written, the likeliest beside each."""
    tokenizer = AutoTokenizer.from_pretrained(models / family)
    texts = ["nobody asks the fox about old rivers", "who"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    settings = {"temperature": 0, "max_tokens": 1, "logprobs": 2, "seed": 1234, "echo": True}
    found = client.completions.create(model=family, prompt=ids if by_ids else texts, **settings)
    for choice, read, text in zip(found.choices, ids, texts, strict=True):
        theirs = log_probs(models / family, read)
        told = choice.logprobs
        written = int(theirs[-1].argmax())
        expected = theirs[torch.arange(len(read)), [*read[1:], written]]
        assert told.token_logprobs[0] is None is told.top_logprobs[0]
        assert told.token_logprobs[1:] == pytest.approx(expected.tolist(), abs=1e-4)
        for likeliest, value, row in zip(told.top_logprobs[1:], told.token_logprobs[1:], theirs, strict=True):
            assert max(likeliest.values()) == pytest.approx(row.max().item(), abs=1e-4)
            assert 1 <= len(likeliest) <= 3 and value in likeliest.values()
        assert "".join(told.tokens[: len(read)]) == text and choice.text.startswith(text)
        assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(len(read) + 1)]
    alone = client.completions.create(model=family, prompt=ids[0], **settings | {"max_tokens": 0})
    assert len(alone.choices[0].logprobs.tokens) == len(ids[0]) and alone.choices[0].text == texts[0]
    assert alone.usage.completion_tokens == 0
    with pytest.raises(openai.UnprocessableEntityError, match="the prompt has token id 99999, expected 0 to"):
        client.completions.create(model=family, prompt=[99999], **settings)
    with pytest.raises(openai.UnprocessableEntityError, match="the prompt is empty"):
        client.completions.create(model=family, prompt=[[]], **settings)


def test_a_t5_tells_of_what_it_writes_alone(client, models):
    prompt, settings = "nobody asks the fox", {"temperature": 0, "max_tokens": 4, "logprobs": 0}
    told = client.completions.create(model="t5", prompt=prompt, **settings).choices[0].logprobs
    tokenizer = AutoTokenizer.from_pretrained(models / "t5")
    model = AutoModelForSeq2SeqLM.from_pretrained(models / "t5", dtype=torch.float32).eval()
    source = torch.tensor([[*tokenizer(prompt, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
    ids = [model.config.decoder_start_token_id]
    expected = []
    for _ in told.tokens:
        with torch.inference_mode():
            row = model(input_ids=source, decoder_input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(row.argmax()))
        expected.append(row.max().item())
    assert told.token_logprobs == pytest.approx(expected, abs=1e-4)
    with pytest.raises(openai.UnprocessableEntityError, match="echo: a T5 reads the prompt with its encoder"):
        client.completions.create(model="t5", prompt=prompt, echo=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_tells_of_each_token(client, family):
    said = client.chat.completions.create(
        model=family, messages=[{"role": "user", "content": "who asks the fox"}], max_tokens=5, temperature=0,
        logprobs=True, top_logprobs=3,
    ).choices[0]  # fmt: skip
    assert 1 <= len(said.logprobs.content) <= 5
    for token in said.logprobs.content:
        assert len(token.top_logprobs) == 3 and token.logprob == pytest.approx(token.top_logprobs[0].logprob)
        assert bytes(token.bytes).decode() == token.token
