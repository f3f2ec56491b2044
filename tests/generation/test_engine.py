import pytest
import torch

from babl.data.collate import make_prompts
from babl.data.contexts import build_views
from babl.data.squad import load_squad
from babl.errors import UserError
from babl.generation import Engine, GenerationConfig
from babl.models import from_pretrained
from babl.text import Detokenizer, load_tokenizer

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\nLily's mom said,"
)


def ids(engine, prompts, **settings):
    return [answer.ids for answer in engine.answer(prompts, GenerationConfig(**settings))]


def test_greedy_on_a_ragged_batch_equals_transformers(engine, prompts, expected):
    answers = engine.answer(prompts, GenerationConfig(max_new_tokens=24))
    assert [a.ids for a in answers] == expected(prompts, max_new_tokens=24, num_beams=1)
    assert {a.finish for a in answers} <= {"eos", "length"}
    assert [a.prompt_tokens for a in answers] == list(map(len, engine._encode(prompts)))


@pytest.mark.parametrize(("beams", "penalty"), [(2, 1.0), (4, 0.6), (4, 2.0), (3, 0.0)])
def test_beam_search_on_a_ragged_batch_equals_transformers(engine, prompts, expected, beams, penalty):
    settings = {"max_new_tokens": 16, "num_beams": beams, "length_penalty": penalty}
    assert ids(engine, prompts, **settings) == expected(prompts, **settings)


def test_the_repetition_penalty_equals_transformers(engine, prompts, expected):
    settings = {"max_new_tokens": 16, "repetition_penalty": 1.7}
    assert ids(engine, prompts, **settings) == expected(prompts, num_beams=1, **settings)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3, "seed": 5, "top_k": 40}], ids=["greedy", "drawn"])
def test_a_row_is_answered_as_if_it_were_alone(engine, prompts, settings):
    together = ids(engine, prompts, max_new_tokens=12, **settings)
    assert together == [ids(engine, [prompt], max_new_tokens=12, **settings)[0] for prompt in prompts]


def test_each_request_has_its_own_settings(engine, prompts):
    configs = [GenerationConfig(max_new_tokens=2 + i % 5, temperature=i % 2, seed=i) for i in range(16)]
    configs[3] = GenerationConfig(max_new_tokens=6, num_beams=2)
    together = engine.answer(prompts, configs)
    alone = [engine.answer([prompt], [config])[0] for prompt, config in zip(prompts, configs, strict=True)]
    assert [(a.ids, a.finish) for a in together] == [(a.ids, a.finish) for a in alone]
    assert all(len(a.ids) <= c.max_new_tokens for a, c in zip(together, configs, strict=True))


def test_seeds_repeat_and_differ(engine, prompts):
    draw = lambda seed: ids(engine, prompts[:2], temperature=2.0, seed=seed)  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


def test_what_is_looked_up_is_what_would_have_been_written(engine):
    prompts = ["the fox reads the fox reads the fox reads", "who answers what who answers", "a"]
    plain = engine.answer(prompts, GenerationConfig(max_new_tokens=40))
    looked = engine.answer(prompts, GenerationConfig(max_new_tokens=40, prompt_lookup_num_tokens=5))
    assert [a.ids for a in looked] == [a.ids for a in plain]
    assert [a.finish for a in looked] == [a.finish for a in plain]
    for a, b in zip(looked, plain, strict=True):
        assert a.log_prob == pytest.approx(b.log_prob, abs=1e-3)
        assert b.steps == len(b.ids)


@pytest.mark.slow
def test_lookup_changes_no_answer_to_1190_real_questions(engine, shared):
    plain, looked = answers_to_real_questions(engine, "none", shared)
    assert [a.ids for a in looked] == [a.ids for a in plain]


@pytest.mark.slow
def test_lookup_changes_no_answer_of_a_trained_model_and_saves_steps(stories, shared):
    plain, looked = answers_to_real_questions(stories, "gold", shared)
    assert [a.ids for a in looked] == [a.ids for a in plain]
    assert sum(a.steps for a in looked) < sum(a.steps for a in plain)


def answers_to_real_questions(engine, arm, shared):
    """Returns the answers without and with prompt lookup."""
    examples = load_squad(shared / "data/squad/dev-v1.1-xquad-en.json")
    texts = [p.text for p in make_prompts(build_views(examples, arm)[0], engine.tokenizer, 440, 20, engine.style)[0]]
    assert len(texts) >= len(examples) == 1190
    configs = [GenerationConfig(max_new_tokens=12, prompt_lookup_num_tokens=n) for n in (0, 6)]
    return [engine.answer(texts, config) for config in configs]


def test_right_drafts_save_steps(stories):
    prompt = "Lily saw a big red ball. " * 8
    looked, plain = (
        stories.answer([prompt], GenerationConfig(max_new_tokens=60, prompt_lookup_num_tokens=n))[0] for n in (6, 0)
    )
    assert looked.ids == plain.ids
    assert looked.steps < plain.steps


def test_a_shared_paragraph_is_read_once_and_answers_stay_the_same(engine, monkeypatch):
    if engine.model.is_encoder_decoder:
        pytest.skip("an encoder reads question and paragraph together")
    paragraph = "Context: nobody asks about the old rivers where the small fox reads a long book\nQuestion: "
    questions = [f"{paragraph}{q}\nAnswer:" for q in ("who reads", "what is small and old", "where")]
    other = ["the town", "Context: a different one altogether, with another book about rivers\nQuestion: who\nAnswer:"]
    read = []
    prefill = engine.model.prefill

    def counting(ids, mask, room):
        read.append(int(mask.sum()))
        return prefill(ids, mask, room)

    monkeypatch.setattr(engine.model, "prefill", counting)
    together = ids(engine, [*questions, *other], max_new_tokens=10)
    assert sum(read) < sum(map(len, engine._encode([*questions[:1], *other]))) + 5
    monkeypatch.undo()
    assert together == [ids(engine, [prompt], max_new_tokens=10)[0] for prompt in (*questions, *other)]


def test_what_all_prompts_begin_with_is_read_once_whatever_the_batches(engine, monkeypatch):
    if engine.model.is_encoder_decoder:
        pytest.skip("an encoder reads the whole prompt at once")
    head = "the small fox reads a long book about old rivers and the town\n\n" * 2
    paragraphs = ("Context: what the fox asks of the book", "the rivers")
    questions = ("who", "where", "what", "asks", "reads")
    prompts = [f"{head}{paragraph}: {question}" for paragraph in paragraphs for question in questions]
    read, prefill = [], engine.model.prefill

    def counting(ids, mask, room):
        read.append(int(mask.sum()))
        return prefill(ids, mask, room)

    config = GenerationConfig(6)
    alone = [engine.answer([prompt], config)[0].ids for prompt in prompts]
    monkeypatch.setattr(engine.model, "prefill", counting)
    assert [answer.ids for answer in engine.answer(prompts, config, batch_tokens=600)] == alone
    assert len(read) == 1, "of several batches, the first has read what they begin with"


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.5, "seed": 3}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}]
)
def test_the_pieces_of_a_stream_are_the_whole(engine, prompts, settings):
    for prompt in prompts[:6]:
        stream = engine.stream(prompt, max_new_tokens=20, **settings)
        pieces = list(stream)
        assert "".join(pieces) == engine.generate([prompt], max_new_tokens=20, **settings)[0] == stream.answer.text
        assert all(pieces)


def test_a_character_is_never_split(engine):
    tokenizer = engine.tokenizer
    text = "the fox 🦊 wrote née Ωμέγα 日本語 ﷽ 👩‍👩‍👧 end"
    reader = Detokenizer(tokenizer)
    pieces = [reader.add(id) for id in tokenizer.encode(text)]
    assert "".join(pieces) + reader.rest() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_stop_strings_end_the_text_and_are_never_shown(stories):
    whole = stories.generate([""], max_new_tokens=80)[0]
    stop = "loved to play"
    stream = stories.stream("", max_new_tokens=80, stop_strings=(stop, "never written"))
    shown = ""
    for piece in stream:
        shown += piece
        assert whole.split(stop)[0].startswith(shown)
    assert shown == whole.split(stop)[0] == stream.answer.text
    assert stream.answer.finish == "stop" and stream.answer.complete


def test_the_documented_story_is_written_from_an_empty_prompt(stories):
    assert stories.generate([""], max_new_tokens=130)[0].startswith(STORY)


def test_what_follows_a_prompt_keeps_its_space(stories):
    text = stories.generate(["Once upon a time, there was a little"], max_new_tokens=4)[0]
    assert text.startswith(" girl")


def test_limits_are_reported(stories):
    short, long = (stories.answer([""], GenerationConfig(max_new_tokens=n))[0] for n in (5, 2000))
    assert (short.finish, len(short.ids), short.complete) == ("length", 5, False)
    assert long.finish in ("context", "eos") and len(long.ids) + long.prompt_tokens <= 512
    filled = stories.answer([[1] + [300] * 507], GenerationConfig(max_new_tokens=20))[0]
    assert filled.finish == "eos" or (filled.finish, len(filled.ids)) == ("context", 4)
    with pytest.raises(UserError, match="the prompt has 512 tokens, expected fewer than the model's context, 512"):
        stories.answer([[1] * 512])


def test_a_cancelled_request_ends_within_a_step_and_the_engine_goes_on(engine, prompts):
    steps = []

    def cancelled():
        steps.append(1)
        return len(steps) == 3

    answers = engine.answer(prompts, GenerationConfig(max_new_tokens=50), cancelled=cancelled)
    assert len(steps) == 3
    assert {a.finish for a in answers} <= {"cancelled", "eos"} and max(len(a.ids) for a in answers) == 3
    beams = engine.answer(prompts[:1], GenerationConfig(max_new_tokens=50, num_beams=3), cancelled=lambda: True)
    assert (beams[0].finish, len(beams[0].ids)) == ("cancelled", 1)
    assert ids(engine, prompts[:3], max_new_tokens=9) == ids(engine, prompts, max_new_tokens=9)[:3]


def test_score_agrees_with_what_was_written(engine, prompts):
    answers = engine.answer(prompts, GenerationConfig(max_new_tokens=30))
    ended = [(p, a) for p, a in zip(prompts, answers, strict=True) if a.finish == "eos"]
    texts = ["the river", " asks who", "a"]
    scores = engine.score(prompts[:3], texts)
    for prompt, text, row in zip(prompts, texts, scores, strict=False):
        assert engine.score([prompt], [text])[0] == pytest.approx(row, abs=1e-4)
        assert all(value < 0 for value in row)
    for prompt, answer in ended:
        if engine.tokenizer.encode_continuation(answer.text) == list(answer.ids[:-1]):
            assert sum(engine.score([prompt], [answer.text])[0]) == pytest.approx(answer.log_prob, abs=1e-3)


def test_a_hook_sees_and_changes_the_logits(reference, prompts):
    engine = Engine(from_pretrained(reference.name_or_path), load_tokenizer(reference.name_or_path))
    engine.hook = lambda logits: logits.index_fill(-1, torch.tensor([7]), 1e4)
    assert ids(engine, prompts[:2], max_new_tokens=3) == [(7, 7, 7)] * 2


def test_ids_the_tokenizer_does_not_have_are_never_written(reference):
    model = from_pretrained(reference.name_or_path)
    tokenizer = load_tokenizer(reference.name_or_path)
    engine = Engine(model, tokenizer)
    (prompt,) = engine._encode(["a"])
    tokenizer.vocab_size -= 20  # as where the rows of a model are filled up to a round number
    (answer,) = engine.answer([prompt], GenerationConfig(max_new_tokens=200, temperature=5.0))
    assert len(answer.ids) > 20 and max(answer.ids) < tokenizer.vocab_size


def test_shapes_that_never_change_give_the_same_logits(engine, prompts):
    """What a CUDA graph replays: attention over the whole room."""
    model, (prompt,) = engine.model, engine._encode(prompts[5:6])
    caches = [engine._read([prompt], 20)[0] for _ in range(2)]
    caches[1].reach = caches[1].room
    with torch.inference_mode():
        for token in (5, 9, 11, 40):
            plain, static = (model.decode(torch.tensor([[token]]), cache) for cache in caches)
            torch.testing.assert_close(static, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_a_cuda_graph_writes_what_plain_steps_write(reference, prompts):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tokenizer = load_tokenizer(reference.name_or_path)
    engine = Engine(from_pretrained(reference.name_or_path, device="cuda"), tokenizer)
    graphed = [ids(engine, [prompt], max_new_tokens=30)[0] for prompt in prompts]
    engine.hook = lambda logits: logits  # a hook is called from Python, so there is no graph
    assert graphed == [ids(engine, [prompt], max_new_tokens=30)[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0, expected at least 0"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0"),
        ({"min_p": 1.5}, "top_p is 1.0 and min_p 1.5, expected at most 1"),
        ({"num_beams": 2, "temperature": 1.0}, "temperature is 1.0, expected 0 with num_beams 2"),
        ({"stop_strings": ("",)}, "stop_strings has an empty one"),
    ],
)
def test_settings_out_of_bounds_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        GenerationConfig(**settings)
