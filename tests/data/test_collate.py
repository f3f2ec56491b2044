import itertools

import pytest
import torch

from babl.data.collate import IGNORE, Feature, collate, make_features, make_prompts
from babl.data.squad import Answer, Example
from babl.errors import UserError
from babl.text import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = ["question: who context: " + " ".join(f"word{i}" for i in range(90))] * 5
    return train_tokenizer(texts, 500, tmp_path_factory.mktemp("tokenizer"))


CONTEXT = " ".join(f"word{i}" for i in range(90))


def example(answer, qid="q"):
    answers = () if answer is None else (Answer(answer, CONTEXT.index(answer)),)
    return Example(qid, "T", "who", CONTEXT, answers)


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


def test_windows_cover_the_context_overlap_and_keep_the_question(tokenizer):
    prompts = make_prompts([example("word40")], "gold", tokenizer, max_tokens=60, stride=10)
    assert len(prompts) > 1
    assert all(p.text.startswith("question: who context: ") for p in prompts)
    assert all(len(tokenizer.encode(p.text)) < 60 for p in prompts)
    assert prompts[0].span[0] == 0 and prompts[-1].span[1] == len(CONTEXT)
    for a, b in itertools.pairwise(prompts):
        assert a.span[0] < b.span[0] < a.span[1], "neighbours overlap"


def test_training_windows_without_the_answer_are_left_out_and_counted(tokenizer):
    features, losses = make_features([example("word3")], "gold", tokenizer, 60, 10)
    windows = len(make_prompts([example("word3")], "gold", tokenizer, 60, 10))
    assert len(features) + losses.excluded_windows == windows and losses.excluded_windows > 0
    assert (losses.windowed, losses.lost_answers) == (1, 0)
    for feature in features:
        assert "word3" in tokenizer.decode(feature.source)


def test_an_answer_too_long_for_any_window_is_counted_as_lost(tokenizer):
    features, losses = make_features([example(CONTEXT[:600])], "gold", tokenizer, 60, 10)
    assert (features, losses.lost_answers) == ([], 1)


def test_with_unanswerable_questions_a_window_without_the_answer_says_so(tokenizer):
    features, losses = make_features([example("word3"), example(None, "n")], "gold", tokenizer, 60, 10)
    targets = {tokenizer.decode(f.target) for f in features if f.id == "q"}
    assert targets == {"word3", "unanswerable"} and losses.excluded_windows == 0


def test_the_arm_without_context_sees_the_question_alone(tokenizer):
    (prompt,) = make_prompts([example("word3")], "none", tokenizer, 60, 10)
    assert prompt.text == "question: who"


def test_a_question_that_leaves_no_room_is_an_error(tokenizer):
    with pytest.raises(UserError, match="max_source_tokens is 20, but question q leaves"):
        make_prompts([example("word3")], "gold", tokenizer, 20, 10)
