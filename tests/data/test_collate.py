import itertools

import pytest
import torch

from babl.data.collate import (
    IGNORE,
    CausalFeature,
    Feature,
    check_context,
    collate,
    collate_causal,
    make_features,
    make_prompts,
)
from babl.data.contexts import View, see
from babl.data.squad import load_squad
from babl.errors import UserError
from babl.generation import Engine
from babl.models.llama import Llama, LlamaConfig
from babl.models.t5 import T5, T5Config
from babl.text import load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = ["question: who context: " + " ".join(f"word{i}" for i in range(90))] * 5
    return train_tokenizer(texts, 500, tmp_path_factory.mktemp("tokenizer"))


CONTEXT = " ".join(f"word{i}" for i in range(90))


def view(answer, qid="q"):
    at = None if answer is None else CONTEXT.index(answer)
    return View(qid, "who", CONTEXT, () if answer is None else (answer,), at)


def test_a_batch_shifts_targets_and_ends_them_with_eos():
    batch = collate(
        [Feature("a", [5, 6, 1], [7, 8, 1]), Feature("b", [5, 1], [9, 1])], pad_id=0, start_id=0, keys=[1, 2]
    )
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 1], [5, 1, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[0, 7, 8], [0, 9, 0]]
    assert batch.labels.tolist() == [[7, 8, 1], [9, 1, IGNORE]]
    assert (batch.targets, batch.tokens, batch.padded) == (5, 10, 12)


def test_no_example_gives_a_blank_row_without_targets():
    batch = collate([], pad_id=0, start_id=0, keys=[])
    assert batch.targets == 0 and batch.inputs["input_ids"].shape == torch.Size([1, 1])


def test_a_decoder_reads_prompt_and_answer_as_one_and_only_the_answer_is_a_target():
    eos = pad = 1  # where padding is EOS, the EOS to be learned must stay a target
    batch = collate_causal([CausalFeature("a", [5, 6], [7, 8, eos]), CausalFeature("b", [5], [9, eos])], pad, [1, 2])
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8], [5, 9, pad, pad]]
    assert batch.labels.tolist() == [[IGNORE, 7, 8, eos], [9, eos, IGNORE, IGNORE]]
    assert torch.equal(batch.inputs["logits_at"], batch.labels != IGNORE), "the head runs on labelled rows alone"
    assert (batch.targets, batch.tokens, batch.padded) == (5, 6, 8)
    blank = collate_causal([], pad, [])
    assert blank.targets == 0 and blank.inputs["input_ids"].shape == torch.Size([1, 1])


def test_an_example_longer_than_the_context_is_an_error():
    features = [CausalFeature("a", [5] * 10, [7, 1])]
    check_context(features, 11)
    check_context(features, None)
    with pytest.raises(UserError, match="example a has 11 tokens with its answer, but the model's context is 10"):
        check_context(features, 10)


@pytest.mark.parametrize("name", ["tokenizers/t5", "tokenizers/llama", "checkpoints/stories260K"])
def test_what_is_asked_begins_as_what_was_learned_on_the_whole_corpus(shared, name):
    tokenizer = load_tokenizer(shared / name)
    shape = {"num_layers": 1} if name.endswith("t5") else {"num_hidden_layers": 1}
    with torch.device("meta"):
        model = T5(T5Config(**shape)) if name.endswith("t5") else Llama(LlamaConfig(**shape))
    engine = Engine(model, tokenizer)
    files = [shared / "data/squad" / f"{name}.json" for name in ("train-v1.1-slice", "dev-v1.1-xquad-en")]
    views = [view for file in files for view in see(load_squad(file), "gold")[0]]
    features, losses = make_features(views, tokenizer, 10_000, 0, engine.style)
    prompts = make_prompts(views, tokenizer, 10_000, 0, engine.style)
    assert len(features) == len(prompts) == len(views) == 5560 and losses.windowed == 0
    assert [feature.source for feature in features] == engine._encode([prompt.text for prompt in prompts])
    assert all(feature.target[-1] == tokenizer.eos_id for feature in features)
    if engine.style == "decoder":  # and prompt and answer are what one text would be, without a token across the seam
        texts = [f"{p.text} {v.golds[0]}" for p, v in zip(prompts, views, strict=True)]
        whole = [[*tokenizer.prefix_ids, *ids] for ids in tokenizer.encode_batch(texts)]
        assert [feature.source + feature.target[:-1] for feature in features] == whole


def test_windows_cover_the_context_overlap_and_keep_the_question(tokenizer):
    prompts = make_prompts([view("word40")], tokenizer, max_tokens=60, stride=10)
    assert len(prompts) > 1
    assert all(p.text.startswith("question: who context: ") for p in prompts)
    assert all(len(tokenizer.encode(p.text)) < 60 for p in prompts)
    assert prompts[0].span[0] == 0 and prompts[-1].span[1] == len(CONTEXT)
    for a, b in itertools.pairwise(prompts):
        assert a.span[0] < b.span[0] < a.span[1], "neighbours overlap"


def test_training_windows_without_the_answer_are_left_out_and_counted(tokenizer):
    features, losses = make_features([view("word3")], tokenizer, 60, 10)
    windows = len(make_prompts([view("word3")], tokenizer, 60, 10))
    assert len(features) + losses.excluded_windows == windows and losses.excluded_windows > 0
    assert (losses.windowed, losses.lost_answers) == (1, 0)
    for feature in features:
        assert "word3" in tokenizer.decode(feature.source)


def test_an_answer_too_long_for_any_window_is_counted_as_lost(tokenizer):
    features, losses = make_features([view(CONTEXT[:600])], tokenizer, 60, 10)
    assert (features, losses.lost_answers) == ([], 1)


def test_with_unanswerable_questions_a_window_without_the_answer_says_so(tokenizer):
    features, losses = make_features([view("word3"), view(None, "n")], tokenizer, 60, 10)
    targets = {tokenizer.decode(f.target) for f in features if f.id == "q"}
    assert targets == {"word3", "unanswerable"} and losses.excluded_windows == 0


def test_a_long_context_without_the_answer_is_trained_on_through_its_first_window(tokenizer):
    features, losses = make_features([View("q", "who", CONTEXT, ("word3",), None)], tokenizer, 60, 10)
    assert len(features) == 1 and "word0" in tokenizer.decode(features[0].source) and losses.lost_answers == 0


def test_without_context_the_prompt_is_the_question_alone(tokenizer):
    (prompt,) = make_prompts([View("q", "who", None)], tokenizer, 60, 10)
    assert prompt.text == "question: who"


def test_a_question_that_leaves_no_room_is_an_error(tokenizer):
    with pytest.raises(UserError, match="max_source_tokens is 20, but question q leaves"):
        make_prompts([view("word3")], tokenizer, 20, 10)
