import time

import httpx
import openai
import pytest


@pytest.fixture(scope="module")
def key(me):
    return me.call("POST", "/api/keys", json={"name": "tests"})["key"]


@pytest.fixture(scope="module")
def client(server, key):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0) as client:
        yield client


def say(text):
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["scripted"]
    assert client.models.retrieve("scripted").owned_by == "babl"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("runs/other")


def test_a_chat_is_answered_at_once_and_streamed(client):
    whole = client.chat.completions.create(model="scripted", messages=say("tokens=5 delay=0 a b"), temperature=0)
    assert whole.choices[0].message.content == "a b a b a" and whole.choices[0].finish_reason == "stop"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (2, 5, 7)
    chunks = list(
        client.chat.completions.create(
            model="scripted",
            messages=say("tokens=20 delay=0.03 a b"),
            max_tokens=10,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == "a b a b a b a b a b" and chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 5
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 10
    parts = [{"role": "user", "content": [{"type": "text", "text": "tokens=1 delay=0 hi"}]}]
    assert client.chat.completions.create(model="scripted", messages=parts).choices[0].message.content == "hi"


def test_a_text_is_continued_at_once_and_streamed(client):
    settings = {"model": "scripted", "prompt": "tokens=4 delay=0 a b"}
    whole = client.completions.create(**settings)
    assert whole.choices[0].text == "a b a b" and whole.object == "text_completion"
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True)) == "a b a b"


def test_mistakes_are_openais(client, server):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="babl-wrong").models.list()
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' does not exist"):
        client.chat.completions.create(model="gpt", messages=say("x"))
    for wrong in ({"messages": []}, {"messages": [{"role": "assistant", "content": "x"}]}):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**{"model": "scripted", "messages": say("x")} | wrong)
    with pytest.raises(openai.BadRequestError, match="expected text"):
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]
        client.chat.completions.create(model="scripted", messages=image)
    with pytest.raises(openai.UnprocessableEntityError, match="the script says fail=prompt"):
        client.chat.completions.create(model="scripted", messages=say("fail=prompt x"))
    with pytest.raises(openai.InternalServerError, match="the script says fail=broken") as broken:
        client.chat.completions.create(model="scripted", messages=say("tokens=9 after=3 fail=broken x"))
    assert broken.value.status_code == 500 and broken.value.type == "server_error"
    with pytest.raises(openai.APIError, match="the script says fail=broken"):
        list(client.completions.create(model="scripted", prompt="tokens=9 after=3 fail=broken x", stream=True))
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="scripted", messages=say("fail=busy x"))
    with pytest.raises(openai.APIError, match="the script says fail=model"):
        list(
            client.chat.completions.create(model="scripted", messages=say("tokens=9 after=3 fail=model x"), stream=True)
        )


def test_a_value_out_of_bounds_is_refused_by_name_and_costs_nobody_anything(server, client, me):
    engine = server.engine().pid
    for name, value in (("seed", 10**20), ("seed", -(10**20)), ("max_tokens", 0), ("top_p", 2), ("temperature", 1e-30)):
        with pytest.raises(openai.BadRequestError, match={"max_tokens": "max_new_tokens"}.get(name, name)):
            client.completions.create(model="scripted", prompt="a", **{name: value})
    for wrong in ({"seed": 10**20}, {"temperature": "hot"}, {"top_k": 2**40}, {"unknown": 1}):
        me.call("POST", "/api/conversations", 400, json={"settings": wrong})
        me.ask(me.conversation(), "x", 400, settings=wrong)
        me.call("POST", "/api/count", 400, json={"content": "x", "model": "scripted", "settings": wrong})
    for seed in (-1, 2**63 - 1, -(2**63)):
        client.completions.create(model="scripted", prompt="tokens=1 delay=0 a", seed=seed, extra_body={"top_k": -1})
    assert server.engine().pid == engine


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_logprobs", 3), ("logit_bias", {"5": -100}),
        ("presence_penalty", 1.5), ("frequency_penalty", -1), ("best_of", 3), ("suffix", "x"),
        ("response_format", {"type": "json_object"}), ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"), ("functions", [{"name": "f"}]), ("reasoning_effort", "high"), ("typical_p", 0.5),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(client, name, value):
    for create, asked in (
        (client.chat.completions.create, {"messages": say("tokens=1 x")}),
        (client.completions.create, {"prompt": "tokens=1 x"}),
    ):
        with pytest.raises(openai.BadRequestError, match=f"{name} is") as refused:
            create(model="scripted", **asked, extra_body={name: value})
        assert (refused.value.param, refused.value.code) == (name, "unsupported_parameter")


def test_several_prompts_and_several_answers_come_in_order(client):
    texts = ["tokens=1 delay=0.2 late", "tokens=2 delay=0 a b", "tokens=1 delay=0 c"]
    found = client.completions.create(model="scripted", prompt=texts, n=2)
    assert [choice.index for choice in found.choices] == list(range(6))
    assert [choice.text for choice in found.choices] == ["late", "late", "a b", "a b", "c", "c"]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (4, 8), "a prompt is read once"
    said = client.chat.completions.create(model="scripted", messages=say("tokens=1 hi"), n=3)
    assert [choice.message.content for choice in said.choices] == ["hi"] * 3
    with pytest.raises(openai.UnprocessableEntityError, match="fail=prompt"):
        client.completions.create(model="scripted", prompt=["tokens=999 a", "fail=prompt x"], max_tokens=999)


@pytest.mark.parametrize(
    ("param", "asked", "message"),
    [
        ("n", {"n": 0}, "n is 0, to 1 prompts; expected 1 to 32 answers in all"),
        ("n", {"n": 33}, "n is 33"),
        ("prompt", {"prompt": []}, "to 0 prompts"),
        ("n", {"prompt": ["a"] * 33}, "to 33 prompts"),
        ("n", {"n": 2, "stream": True}, "n asks for 2 answers, but a stream has one"),
        ("prompt", {"prompt": ["a", "b"], "stream": True}, "prompt asks for 2 answers"),
        ("logprobs", {"logprobs": 1, "stream": True}, "logprobs is not supported in a stream"),
        ("echo", {"echo": True, "stream": True}, "echo is not supported in a stream"),
        ("logprobs", {"logprobs": 21}, "Expected `int` <= 20"),
        ("logprobs", {"logprobs": True}, "logprobs"),
        ("prompt", {"prompt": [[-1.5]]}, "prompt"),
        (None, {"prompt": ["a", 1]}, "prompt mixes token ids with others"),
    ],
)
def test_what_cannot_be_asked_so_is_named(client, param, asked, message):
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.completions.create(**{"model": "scripted", "prompt": "tokens=1 a"} | asked)
    assert refused.value.param == param


def test_what_changes_nothing_is_taken(client):
    neutral = {"n": 1, "echo": False, "logprobs": None, "presence_penalty": 0, "frequency_penalty": 0.0, "tools": [],
               "tool_choice": "auto", "response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"},
               "stream": None, "logit_bias": {}, "stop": None, "seed": None}  # fmt: skip
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "tokens=1 delay=0 hi"}]
    said = client.chat.completions.create(model="scripted", messages=messages, extra_body=neutral)
    assert said.choices[0].message.content == "hi"
    with pytest.raises(openai.BadRequestError, match="a message's role is 'tool', expected one of system, developer"):
        client.chat.completions.create(model="scripted", messages=[{"role": "tool", "content": "1"}, *messages])


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/embeddings", "/v1/completions/", "/v1/chat"])
def test_an_unknown_address_says_so_as_openai_does(server, path):
    for method in ("GET", "POST", "DELETE"):
        response = httpx.request(method, server.address + path, json={})
        assert response.status_code == 404 and path in response.json()["error"]["message"]
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_a_question_about_a_context(server, key):
    http = httpx.Client(base_url=server.address, headers={"Authorization": f"Bearer {key}"})
    body = {"model": "scripted", "question": "tokens=2 delay=0 where?", "context": "In Lima, Peru."}
    found = http.post("/v1/qa", json=body).json()
    assert (found["answer"], found["start"], found["end"], found["in_context"]) == ("In Lima,", 0, 8, True)
    assert 0 < found["probability"] < 1 and found["prompt_tokens"] == 4 and found["weights"] == "scripted"
    without = http.post("/v1/qa", json=body | {"context": None}).json()
    assert without["start"] is None and without["in_context"] is None
    assert http.post("/v1/qa", json={"model": "scripted"}).json()["error"]["type"] == "invalid_request_error"
    assert http.get("/v1/qa").status_code == 405


def test_who_leaves_is_not_answered_any_more(client, me):
    def running():
        return me.call("GET", "/api/status")["engine"]["running"]

    before = running()
    with client.chat.completions.create(
        model="scripted", messages=say("tokens=2000 x"), max_tokens=2000, stream=True
    ) as it:
        next(iter(it))
        assert running() == before + 1
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(
            model="scripted", messages=say("tokens=2000 x"), max_tokens=2000
        )
    deadline = time.monotonic() + 5
    while running() > before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
