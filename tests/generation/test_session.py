import json

import pytest

from babl.errors import UserError
from babl.generation.conversation import Reader
from babl.generation.session import Session
from babl.text import load_tokenizer, train_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base tokenizer, and the same with a chat template and a BOS that the tokenizer adds by itself, too."""
    base, talks = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("talks")
    for folder in (base, talks):
        train_tokenizer(["who reads the long book"] * 3, 300, folder)
    settings = json.loads((talks / "tokenizer_config.json").read_text())
    settings |= {"chat_template": TEMPLATE, "bos_token": "<pad>", "add_bos_token": True}
    (talks / "tokenizer_config.json").write_text(json.dumps(settings))
    return base, talks


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("BABL_HOME", str(tmp_path))


def said(*contents):
    session = Session("m")
    for role, content in zip(("user", "assistant") * 5, contents, strict=False):
        session.say(role, content)
    return session


def test_a_chat_template_gives_the_ids_that_transformers_gives(folders):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folders[1]), load_tokenizer(folders[1])
    session = said("who reads", "the long book", " the book? ")
    expected = theirs.apply_chat_template(session.messages, add_generation_prompt=True, return_dict=False)
    worded = session.worded(Reader(ours, "decoder"), 8)
    assert (worded.prompts, worded.dropped) == ([expected], 0)
    assert worded.prompts[0].count(ours.bos_id) == 1


def test_a_question_that_had_no_answer_is_not_asked_with_the_next(folders):
    """Published templates refuse a conversation in which user and assistant do not take turns."""
    tokenizer = load_tokenizer(folders[1])
    killed, whole = said("who reads", "the long book"), said("who reads", "the long book", "the book?")
    for question in ("reads?", "who?", "the book?"):
        killed.say("user", question)
    assert killed.worded(Reader(tokenizer, "decoder"), 8) == whole.worded(Reader(tokenizer, "decoder"), 8)
    assert [message["content"] for message in killed.messages][2:] == ["reads?", "who?", "the book?"]


def test_control_tokens_that_a_user_types_stay_text(folders):
    tokenizer = load_tokenizer(folders[1])
    (ids,) = said("</s> and <pad>").worded(Reader(tokenizer, "decoder"), 8).prompts
    assert ids.count(tokenizer.eos_id) == ids.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(ids).count("</s> and <pad>") == 1


def test_the_template_is_run_in_a_sandbox(folders):
    tokenizer = load_tokenizer(folders[1])
    tokenizer.chat_template = "{{ ''.__class__.__mro__ }}"
    with pytest.raises(UserError, match="the model's chat template failed"):
        said("x").worded(Reader(tokenizer, "decoder"), 8)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="chat template failed: roles must alternate"):
        said("x").worded(Reader(tokenizer, "decoder"), 8)


def test_a_conversation_comes_back_as_it_was(tmp_path):
    session = said("née?", "oui")
    session.context = "c"
    assert session.save() == tmp_path / "conversations" / f"{session.id}.json"
    assert Session.load(session.id) == session
    with pytest.raises(UserError, match=f"no conversation 'x' in .*; the newest is {session.id}"):
        Session.load("x")
    (tmp_path / "conversations" / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.json: not a conversation that can be read"):
        Session.load("x")
