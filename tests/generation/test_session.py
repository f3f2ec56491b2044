import json

import pytest

from babl.errors import UserError
from babl.generation.session import Session
from babl.text import load_tokenizer, train_tokenizer
from babl.text.prompts import qa_prompt

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
    ids, dropped = session.prompt(ours, "decoder", None)
    assert (ids, dropped) == (expected, 0)
    assert ids.count(ours.bos_id) == 1


def test_control_tokens_that_a_user_types_stay_text(folders):
    tokenizer = load_tokenizer(folders[1])
    ids, _ = said("</s> and <pad>").prompt(tokenizer, "decoder", None)
    assert ids.count(tokenizer.eos_id) == ids.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(ids).count("</s> and <pad>") == 1


def test_the_template_is_run_in_a_sandbox(folders):
    tokenizer = load_tokenizer(folders[1])
    tokenizer.chat_template = "{{ ''.__class__.__mro__ }}"
    with pytest.raises(UserError, match="the model's chat template failed"):
        said("x").prompt(tokenizer, "decoder", None)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="chat template failed: roles must alternate"):
        said("x").prompt(tokenizer, "decoder", None)


def test_a_base_model_reads_the_question_as_in_training(folders):
    tokenizer = load_tokenizer(folders[0])
    session = said("earlier", "yes", "who reads")
    session.context = "the book"
    for style in ("t5", "decoder"):
        ids, dropped = session.prompt(tokenizer, style, 4)
        assert dropped == 0
        assert tokenizer.decode(ids) == qa_prompt("who reads", "the book", style)


def test_the_oldest_messages_give_way_and_are_counted(folders):
    tokenizer = load_tokenizer(folders[1])
    session = said("one", "two", "three", "four", "five")
    session.context, session.system = "the long book", "be kind"
    whole, _ = session.prompt(tokenizer, "decoder", None)
    ids, dropped = session.prompt(tokenizer, "decoder", len(whole) - 1)
    text = tokenizer.decode(ids)
    assert dropped == 2 and "one" not in text and "three" in text
    assert "be kind" in text and "Context: the long book\n\nfive" in text
    ids, dropped = session.prompt(tokenizer, "decoder", 1)
    assert dropped == 4 and "five" in tokenizer.decode(ids), "the last question is never left out"


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
