import itertools
import json
import re
from collections import Counter

import pytest
import torch

from babl.data.collate import (
    IGNORE,
    CausalFeature,
    Feature,
    collate,
    collate_causal,
    make_features,
    make_prompts,
)
from babl.data.contexts import View, build_views
from babl.data.squad import load_squad
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
    batch = collate([Feature("a", [5, 6, 1], [7, 8, 1]), Feature("b", [5, 1], [9, 1])], start_id=3, keys=[1, 2])
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 1], [5, 1, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[3, 7, 8], [3, 9, 0]]
    assert batch.labels.tolist() == [[7, 8, 1], [9, 1, IGNORE]]
    assert (batch.targets, batch.tokens, batch.padded) == (5, 10, 12)


def test_no_example_gives_a_blank_row_without_targets():
    batch = collate([], start_id=0, keys=[])
    assert batch.targets == 0 and batch.inputs["input_ids"].shape == torch.Size([1, 1])


def test_a_decoder_reads_prompt_and_answer_as_one_and_only_the_answer_is_a_target():
    eos = 0  # where what fills a row is EOS, the EOS to be learned must stay a target
    batch = collate_causal([CausalFeature("a", [5, 6], [7, 8, eos]), CausalFeature("b", [5], [9, eos])], [1, 2])
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, 7, 8, eos], [9, eos, IGNORE, IGNORE]]
    assert torch.equal(batch.inputs["logits_at"], batch.labels != IGNORE), "the head runs on labelled rows alone"
    assert (batch.targets, batch.tokens, batch.padded) == (5, 6, 8)
    blank = collate_causal([], [])
    assert blank.targets == 0 and blank.inputs["input_ids"].shape == torch.Size([1, 1])


def test_what_fills_a_batch_is_an_id_that_the_smallest_model_has():
    short, long = Feature("a", [], [0]), Feature("b", [0, 0, 0], [0, 0, 0])
    for batch in (collate([short, long], 0, [1, 2]), collate([], 0, []), collate_causal([], [])):
        assert all(int(batch.inputs[name].max()) == 0 for name in batch.inputs if name.endswith("input_ids"))


@pytest.mark.parametrize("name", ["tokenizers/t5", "tokenizers/llama", "checkpoints/stories260K"])
def test_what_is_asked_begins_as_what_was_learned_on_the_whole_corpus(shared, name):
    tokenizer = load_tokenizer(shared / name)
    shape = {"num_layers": 1} if name.endswith("t5") else {"num_hidden_layers": 1}
    with torch.device("meta"):
        model = T5(T5Config(**shape)) if name.endswith("t5") else Llama(LlamaConfig(**shape))
    engine = Engine(model, tokenizer)
    files = [shared / "data/squad" / f"{name}.json" for name in ("train-v1.1-slice", "dev-v1.1-xquad-en")]
    views = [view for file in files for view in build_views(load_squad(file), "gold")[0]]
    features, losses = make_features(views, tokenizer, 10_000, 0, engine.style)
    prompts, _ = make_prompts(views, tokenizer, 10_000, 0, engine.style)
    assert len(features) == len(prompts) == len(views) == 5560 and losses.windowed == 0
    assert [feature.source for feature in features] == engine._encode([prompt.text for prompt in prompts])
    assert all(feature.target[-1] == tokenizer.eos_id for feature in features)
    if engine.style == "decoder":  # and prompt and answer are what one text would be, without a token across the seam
        texts = [f"{p.text} {v.golds[0]}" for p, v in zip(prompts, views, strict=True)]
        whole = [[*tokenizer.prefix_ids, *ids] for ids in tokenizer.encode_batch(texts)]
        assert [feature.source + feature.target[:-1] for feature in features] == whole


def test_training_windows_without_the_answer_are_left_out_and_counted(tokenizer):
    features, losses = make_features([view("word3")], tokenizer, 60, 10)
    windows = len(make_prompts([view("word3")], tokenizer, 60, 10)[0])
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
    ((prompt,), _) = make_prompts([View("q", "who", None)], tokenizer, 60, 10)
    assert prompt.text == "question: who"


def test_a_question_that_leaves_no_room_is_left_out_and_told(tokenizer):
    views = [view("word3"), View("long", "who " * 40, CONTEXT, ("word3",), CONTEXT.index("word3")), view("word5", "r")]
    prompts, overlong = make_prompts(views, tokenizer, 60, 10)
    assert {prompt.view for prompt in prompts} == {0, 2} and list(overlong) == ["long"]
    assert re.fullmatch(
        r"max_source_tokens is 60, but question long takes \d+ tokens, which leaves less than twice the stride of 10 "
        "for its context",
        overlong["long"],
    )
    features, losses = make_features(views, tokenizer, 60, 10)
    assert {feature.id for feature in features} == {"q", "r"} and losses.overlong == overlong
    assert losses.lost_answers == 0, "a question that is not read loses no answer"
    assert str(losses).endswith(f"1 questions too long, first: {overlong['long']}")


def test_a_question_too_long_by_itself_is_left_out_and_told(tokenizer):
    prompts, overlong = make_prompts([View("q", "who " * 90, None)], tokenizer, 60, 10)
    assert prompts == [] and re.fullmatch("max_source_tokens is 60, but question q takes 9\\d tokens", overlong["q"])


def test_an_example_longer_than_the_models_context_is_left_out_and_told(tokenizer):
    views = [view("word3"), View("long", "who", CONTEXT, (CONTEXT[:200],), 0)]
    whole, _ = make_features(views, tokenizer, 1000, 10, "decoder")
    lengths = [feature.lengths[0] for feature in whole]
    kept, losses = make_features(views, tokenizer, 1000, 10, "decoder", context_length=lengths[1] - 1)
    assert [feature.id for feature in kept] == ["q"] and lengths[0] < lengths[1]
    assert losses.overlong == {
        "long": f"the model's context is {lengths[1] - 1}, but question long takes {lengths[1]} tokens with its answer"
    }
    kept, losses = make_features(views, tokenizer, 1000, 10, "decoder", context_length=lengths[1])
    assert len(kept) == 2 and losses.overlong == {}


def test_a_context_of_spaces_alone_or_none_at_all_is_read(tokenizer):
    for context in ("", " ", " " * 500, "\n" * 500):
        prompts, overlong = make_prompts([View("q", "who", context)], tokenizer, 60, 10)
        assert prompts and not overlong and prompts[-1].span[1] == len(context)


# Text of the test's own in scripts of every kind, with a name that one tokenizer knows and another spells by bytes.
RUSSIAN = (
    "Маяк на северном мысе построили рыбаки в тысяча восемьсот двенадцатом году. Его свет видели за сорок вёрст, "
    "а ёлки вокруг него посадил смотритель Ёжиков. Зимой башню заносило снегом по самые окна! Кто чинил фонарь? "
)
CHINESE = (
    "北方的灯塔是渔民在一百年前建造的。它的光芒四十里外都能看见，守塔人每天清晨擦拭玻璃。冬天的雪一直堆到窗口！"
    "谁来修理那盏灯呢？老人说，他的父亲把钥匙埋在石阶下面。"
)
JAPANESE = (
    "北の岬の灯台は百年前に漁師たちが建てました。その光は四十キロ先からも見えます。冬になると雪が窓まで積もります！"
    "誰がランプを直すのでしょうか。老人は鍵を石段の下に埋めたと言いました。"
)
THAI = "ประภาคารทางเหนือสร้างโดยชาวประมงเมื่อร้อยปีก่อน แสงของมันมองเห็นได้ไกลสี่สิบกิโลเมตร ในฤดูหนาวหิมะท่วมถึงหน้าต่าง "
ARABIC = "بنى الصيادون المنارة الشمالية قبل مئة عام. كان ضوؤها يرى من مسافة أربعين ميلا. هل أصلح أحد المصباح؟ "
ENGLISH = (
    "The five-year survey of the St. Brendan lighthouse (1907–1912) cost $3.5 million; Gandhi's photograph hung there. "
    "See https://example.org/lighthouses/north/brendan?year=1912&keeper=odonnell#lamp_house_and_tower for plans.\n"
)
SCRIPTS = {"ru": RUSSIAN, "zh": CHINESE, "ja": JAPANESE, "th": THAI, "ar": ARABIC, "en": ENGLISH}


def long_views(repeats=12):
    """Returns views with contexts that no window holds whole, the pieces of each numbered so that no two are alike."""
    contexts = {name: "".join(f"{i} {text}" for i in range(repeats)) for name, text in SCRIPTS.items()}
    contexts["unbroken"] = "".join(f"x{i}yz" for i in range(900))
    contexts["emoji"] = "".join(f"😀𠮷{i}é" for i in range(400))
    return [View(name, "What stands there?", context) for name, context in contexts.items()]


def windows_of(name, views, max_tokens, stride, shared):
    """Returns the tokenizer, and for each view its windows as (span, tokens of the prompt), counted by the test."""
    style = "t5" if name.endswith("t5") else "decoder"
    tokenizer = load_tokenizer(shared / name)
    prompts, overlong = make_prompts(views, tokenizer, max_tokens, stride, style)
    assert not overlong
    wording = "question: {} context: {}" if style == "t5" else "Context: {1}\nQuestion: {0}\nAnswer:"
    found = {}
    for prompt in prompts:
        view = views[prompt.view]
        assert prompt.text == wording.format(view.question, view.context[slice(*prompt.span)])
        found.setdefault(view.id, []).append((prompt.span, len(tokenizer.encode(prompt.text)) + 1))  # EOS, or BOS
    return tokenizer, found


@pytest.mark.parametrize("name", ["tokenizers/t5", "tokenizers/llama", "checkpoints/stories260K"])
@pytest.mark.parametrize(("max_tokens", "stride"), [(128, 32), (160, 48)])
def test_windows_keep_their_limit_share_the_stride_and_are_full_in_every_script(shared, name, max_tokens, stride):
    views = long_views()
    tokenizer, found = windows_of(name, views, max_tokens, stride, shared)
    contexts = {view.id: view.context for view in views}
    several = {qid: windows for qid, windows in found.items() if len(windows) > 1}
    fills, most = [], Counter()
    for qid, windows in found.items():
        assert windows[0][0][0] == 0 and windows[-1][0][1] == len(contexts[qid])
        assert max(tokens for _, tokens in windows) <= max_tokens
    for qid, windows in several.items():
        fills += [tokens / max_tokens for _, tokens in windows[:-1]]
        for ((_, end), _), ((start, _), _) in itertools.pairwise(windows):
            tokens = len(tokenizer.encode(contexts[qid][start:end]))
            assert tokens >= stride, (qid, contexts[qid][start:end])
            most[qid] = max(most[qid], tokens - stride)
    assert {"ru", "en", "unbroken"} <= set(several), "T5 reads a row of unknown letters as one token"
    assert name.endswith("t5") or {"zh", "ja", "th", "ar", "emoji"} <= set(several)
    assert sum(fills) / len(fills) >= 0.9
    assert max(most.values()) <= 20, most


@pytest.mark.parametrize("name", ["tokenizers/t5", "tokenizers/llama"])
def test_windows_of_real_paragraphs_keep_their_limit_share_the_stride_and_are_full(shared, name):
    paragraphs = [
        paragraph["context"]
        for article in json.loads((shared / "data/squad/train-v1.1-slice.json").read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
    ]
    views = [View(str(i), "Who is it?", context) for i, context in enumerate(paragraphs)]
    tokenizer, found = windows_of(name, views, 160, 48, shared)
    several = {int(qid): windows for qid, windows in found.items() if len(windows) > 1}
    assert len(several) > 150 and max(tokens for windows in found.values() for _, tokens in windows) <= 160
    fills = [tokens / 160 for windows in several.values() for _, tokens in windows[:-1]]
    shares = [
        len(tokenizer.encode(paragraphs[i][start:end]))
        for i, windows in several.items()
        for ((_, end), _), ((start, _), _) in itertools.pairwise(windows)
    ]
    assert min(shares) >= 48 and sorted(shares)[len(shares) // 2] <= 50
    assert sum(fills) / len(fills) >= 0.95 and min(fills) >= 0.9


def test_windows_cover_the_context_and_keep_the_question(tokenizer):
    prompts, _ = make_prompts([view("word40")], tokenizer, max_tokens=60, stride=10)
    assert len(prompts) > 1
    assert all(p.text.startswith("question: who context: ") for p in prompts)
    assert prompts[0].span[0] == 0 and prompts[-1].span[1] == len(CONTEXT)
    for a, b in itertools.pairwise(prompts):
        assert a.span[0] < b.span[0] < a.span[1], "neighbours overlap"
