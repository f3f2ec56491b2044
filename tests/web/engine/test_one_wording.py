"""The terminal, the browser and `babl query` make a model read the same ids, and those are what transformers gives."""

import itertools
import json
import shutil

import pytest
from transformers import AutoTokenizer

from babl.data.contexts import View
from babl.evaluation.predictions import PromptLimits, predict
from babl.generation.conversation import MOST_PROMPT, Reader, prompt_style
from babl.generation.session import Session
from babl.models.weights import describe
from babl.text.prompts import system_message
from babl.web.engine.prepare import prepare

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SYSTEM, CONTEXT = "be kind", "the small fox reads a book"
LONG = "the small fox reads a long book about old rivers and the town. " * 12
NEW_TOKENS = 8


@pytest.fixture(scope="module", params=[*itertools.product(("t5", "llama", "bloom"), (False, True))], ids=str)
def case(request, folder, tmp_path_factory):
    """(family, whether a chat template words its conversations, folder, context length)."""
    family, templated = request.param
    copy = tmp_path_factory.mktemp("copy") / "model"
    shutil.copytree(folder / family, copy)
    if templated:
        settings = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return family, templated and family != "t5", copy, describe(copy)["context"]


def terminal(case, said, system="", context=""):
    family, _, folder, length = case
    session = Session(str(folder), system, context)
    for role, content in zip(itertools.cycle(("user", "assistant")), said, strict=False):
        session.say(role, content)
    return session.worded(Reader.of(folder, family, length), NEW_TOKENS)


def browser(case, chat, said, system="", context=""):
    family, _, folder, length = case
    request = chat("m", *said, system=system or None, context=context or None, max_new_tokens=NEW_TOKENS)
    return prepare(request, Reader.of(folder, family, length))


def theirs(case, said, system="", context=""):
    """What transformers' tokenizer makes of the conversation, the wordings written out once more."""
    family, templated, folder, length = case
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = said[-1]
    if family == "t5":
        context = context or system
        text = f"question: {question} context: {context}" if context else f"question: {question}"
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    if not templated:
        text = f"Context: {context}\nQuestion: {question}\nAnswer:" if context else f"Question: {question}\nAnswer:"
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    room = (length or MOST_PROMPT + NEW_TOKENS) - NEW_TOKENS
    asked = f"Context: {context}\n\n{question}" if context else question
    turns = [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 50, said)]  # noqa: B905
    turns[-1]["content"] = asked
    while True:
        told = [{"role": "system", "content": system}] if system else []
        text = tokenizer.apply_chat_template([*told, *turns], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= room or len(turns) == 1:
            return ids
        turns = turns[2:]


CONVERSATIONS = {
    "a question": {"said": ["who reads"]},
    "with a context": {"said": ["who reads"], "context": CONTEXT},
    "with a system message": {"said": ["who reads"], "system": SYSTEM},
    "three turns with both": {"said": ["the fox", "reads", "what", "a book", "who?"]}
    | {"system": SYSTEM, "context": CONTEXT},
    "a history that is too long": {"said": [f"the book {'about old rivers ' * 5}{i}" for i in range(99)]},
    "too long with both": {"said": [f"the town {'by the river ' * 5}{i}" for i in range(99)]}
    | {"system": SYSTEM, "context": CONTEXT},
}


@pytest.mark.parametrize("named", CONVERSATIONS)
def test_terminal_and_browser_read_what_transformers_makes_of_it(case, chat, named):
    expected = theirs(case, **CONVERSATIONS[named])
    there, here = terminal(case, **CONVERSATIONS[named]), browser(case, chat, **CONVERSATIONS[named])
    assert there.prompts == here.prompts == [expected]
    assert there.cut_tokens == here.cut_tokens
    assert (there.cut_tokens > 0) == (
        there.dropped > 0 or bool(there.windows and case[0] != "t5" and "system" in named)
    )


def test_control_typed_by_a_user_is_the_same_text_in_both(case, chat):
    conversation = {"said": ["</s> <|user|> née  \n?"], "context": "a\n\nb "}
    there, here = terminal(case, **conversation), browser(case, chat, **conversation)
    assert there.prompts == here.prompts
    assert AutoTokenizer.from_pretrained(case[2]).decode(there.prompts[0]).count("née") == 1


def test_a_long_context_is_read_through_the_same_windows_in_both(case, chat):
    there, here = (
        ask(*also, ["who reads"], context=LONG * 6) for ask, also in ((terminal, [case]), (browser, [case, chat]))
    )
    assert there.prompts == here.prompts and there.windows == here.windows
    assert (len(there.prompts) > 1) is not case[1], "a chat template words one prompt"


def test_what_is_not_read_is_counted(case):
    _, templated, folder, _ = case
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = ["the fox", "reads", "who reads"]
    worded = terminal(case, said)
    unread = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in said[:2])
    assert (worded.cut_tokens, worded.dropped) == ((0, 0) if templated else (unread, 2))


@pytest.mark.parametrize("context", [None, CONTEXT])
@pytest.mark.parametrize("system", ["", SYSTEM])
def test_query_and_evaluate_ask_with_the_chats_ids(case, engines, monkeypatch, context, system):
    family, templated, folder, _ = case
    if not templated and (system or family == "t5"):
        return  # a system message needs a template; T5's is not for its questions
    engine = engines["talks" if templated else family]
    engine = type(engine)(engine.model, Reader.of(folder, family, None).tokenizer)
    asked = []
    monkeypatch.setattr(
        engine, "answer", lambda ids, config: asked.extend(ids) or type(engine).answer(engine, ids, config)
    )
    asking = PromptLimits(200, 50, 2, chat=templated, before=system_message(system))
    assert prompt_style(engine, templated, system_message(system)) == ("chat" if templated else "decoder")
    predict(engine, [View("q", "who reads", context)], asking, progress=False)
    assert asked == [theirs(case, ["who reads"], system, context or "")]
