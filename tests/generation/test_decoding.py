"""Decoding a step at a time: rows join, are cancelled and are read in parts, and write what they write alone."""

import pytest
import torch

from babl.generation import GenerationConfig


def finish(decoding):
    while not decoding.done:
        decoding.step()


@pytest.fixture
def configs(prompts):
    """Settings of every kind in turn; a stop string and limits that end rows at different steps."""
    kinds = [
        {"max_new_tokens": 12},
        {"max_new_tokens": 5, "temperature": 1.2, "seed": 3},
        {"max_new_tokens": 20, "repetition_penalty": 1.3},
        {"max_new_tokens": 9, "prompt_lookup_num_tokens": 4},
    ]
    return [GenerationConfig(**kinds[i % len(kinds)]) for i in range(len(prompts))]


def test_rows_that_join_write_what_they_write_alone(engine, prompts, configs):
    alone = [engine.answer([prompt], [config])[0] for prompt, config in zip(prompts, configs, strict=True)]
    running = engine.begin(prompts[:3], configs[:3])
    rows = list(running.rows)
    for i in range(3, len(prompts)):
        running.step()
        newcomer = engine.begin([prompts[i]], [configs[i]])
        rows += newcomer.rows
        newcomer.step()
        if running.done:
            running = newcomer
        elif not newcomer.done:
            running.join(newcomer)
    finish(running)
    answers = [row.answer() for row in rows]
    assert [(a.ids, a.finish, a.text) for a in answers] == [(a.ids, a.finish, a.text) for a in alone]
    for answer, expected in zip(answers, alone, strict=True):
        assert answer.log_prob == pytest.approx(expected.log_prob, abs=1e-3)


def test_a_joined_cache_holds_no_more_than_its_rows_need(engine, prompts):
    running = engine.begin([prompts[10]], [GenerationConfig(max_new_tokens=100)])
    for _ in range(3):
        running.step()
        short = engine.begin(prompts[:1], [GenerationConfig(max_new_tokens=4)])
        short.step()
        if not (running.done or short.done):
            running.join(short)
            running.rows[0].cancel()
    needed = max(row.origin + row.limit for row in running.rows)
    assert running._cache.room == needed < 100


@pytest.mark.parametrize("read_tokens", [1, 7, 40])
def test_prompts_read_in_parts_are_answered_alike(engine, prompts, read_tokens):
    if engine.model.is_encoder_decoder:
        pytest.skip("an encoder reads a prompt at once")
    configs = [GenerationConfig(max_new_tokens=8)] * 5
    parts, steps = engine.begin(prompts[3:8], configs, read_tokens), 0
    rows = list(parts.rows)
    while not parts.read:
        assert not any(row.ids for row in rows)
        parts.step()
        steps += 1
    longest, part = max(len(row.prompt) for row in rows), max(1, read_tokens // 5)
    assert steps == -(-longest // part)
    finish(parts)
    assert [row.answer().ids for row in rows] == [a.ids for a in engine.answer(prompts[3:8], configs[0])]


@pytest.mark.parametrize("read_tokens", [5, 40, None])
@pytest.mark.parametrize("lookup", [0, 3])
def test_scored_tokens_have_transformers_log_probabilities_however_they_are_read(
    engine, reference, prompts, read_tokens, lookup
):
    if engine.model.is_encoder_decoder:
        pytest.skip("an encoder gives its tokens no probabilities")
    config = GenerationConfig(6, likeliest=3, echo=True, prompt_lookup_num_tokens=lookup)
    decoding = engine.begin(prompts[:6], [config] * 6, read_tokens)
    rows = list(decoding.rows)
    finish(decoding)
    for row in rows:
        ids = [*row.prompt, *row.ids]
        with torch.inference_mode():
            log_probs = reference(torch.tensor([ids])).logits[0, :, : engine.tokenizer.vocab_size].log_softmax(-1)
        first, *others = row.answer().scored
        assert (first.id, first.log_prob, first.likeliest) == (ids[0], None, [])
        assert [token.id for token in others] == ids[1:]
        for token, expected in zip(others, log_probs, strict=False):
            assert token.log_prob == pytest.approx(expected[token.id].item(), abs=1e-4)
            best = expected.topk(3)
            assert [value for _, value in token.likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)
        written = [token.log_prob for token in others[len(row.prompt) - 1 :]]
        assert sum(written) == pytest.approx(row.log_prob, abs=1e-4)


def test_a_cancelled_row_writes_nothing_more_and_the_others_go_on(engine, prompts):
    configs = [GenerationConfig(max_new_tokens=10, temperature=1.0, seed=i) for i in range(4)]
    alone = [engine.answer([prompt], [config])[0] for prompt, config in zip(prompts[4:8], configs, strict=True)]
    decoding = engine.begin(prompts[4:8], configs)
    rows = list(decoding.rows)
    rows[2].cancel()  # before anything is read
    decoding.step()
    decoding.step()
    rows[0].cancel()
    written = len(rows[0].ids)
    finish(decoding)
    answers = [row.answer() for row in rows]
    assert answers[2].ids == () and answers[2].finish == "cancelled"
    assert len(answers[0].ids) == written and answers[0].ids == alone[0].ids[:written]
    assert [answers[i].ids for i in (1, 3)] == [alone[i].ids for i in (1, 3)]


def test_the_pieces_are_the_answer(engine, prompts):
    decoding = engine.begin(prompts[:4], [GenerationConfig(max_new_tokens=20, stop_strings=("old", "zz"))] * 4)
    rows, texts = list(decoding.rows), [""] * 4
    while not decoding.done:
        decoding.step()
        for i, row in enumerate(rows):
            texts[i] += row.piece()
    assert texts == [row.answer().text for row in rows]
    assert all(row.piece() == "" for row in rows)
