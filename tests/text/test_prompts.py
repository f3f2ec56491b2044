import pytest

from babl.errors import UserError
from babl.text.prompts import NO_ANSWER, clean_answer, qa_prompt, qa_target


def test_t5_prompt():
    assert qa_prompt("Who?", "Ann ran.") == "question: Who? context: Ann ran."
    assert qa_prompt("Who?", None) == "question: Who?"


def test_decoder_prompt_puts_the_context_first_and_ends_without_a_space():
    assert qa_prompt("Who?", "Ann ran.", style="decoder") == "Context: Ann ran.\nQuestion: Who?\nAnswer:"
    assert qa_prompt("Who?", None, style="decoder") == "Question: Who?\nAnswer:"


def test_an_empty_context_is_not_an_absent_one():
    assert qa_prompt("Who?", "") == "question: Who? context: "
    assert qa_prompt("Who?", "", style="decoder") == "Context: \nQuestion: Who?\nAnswer:"


@pytest.mark.parametrize("style", ["t5", "decoder"])
def test_whitespace_and_braces_pass_through(style):
    question, context = "  What\tis {x}?\n ", "\u00a0a  b{0}\n\n"
    prompt = qa_prompt(question, context, style=style)
    assert question in prompt
    assert context in prompt


def test_a_chat_models_user_gives_the_context_before_the_question():
    assert qa_prompt("Who?", "Ann ran.", style="chat") == "Context: Ann ran.\n\nWho?"
    assert qa_prompt("Who?", None, style="chat") == "Who?"
    assert (qa_target("Ann", "chat"), qa_target(None, "chat")) == ("Ann", "unanswerable")


def test_target():
    assert qa_target("Ann", "t5") == "Ann"
    assert qa_target("Ann", "decoder") == " Ann"
    assert qa_target(None, "t5") == NO_ANSWER == "unanswerable"
    assert qa_target(None, "decoder") == " unanswerable"


@pytest.mark.parametrize("word", [lambda style: qa_prompt("q", None, style), lambda style: qa_target("a", style)])
def test_an_unknown_style_is_named(word):
    with pytest.raises(UserError, match="prompt style 'gpt': expected 't5', 'decoder' or 'chat'"):
        word("gpt")


@pytest.mark.parametrize(
    ("generated", "answer"),
    [
        (" Ann Lee ", "Ann Lee"),
        ("Ann\nQuestion: Who else?", "Ann"),
        ("\nAnn", ""),
        ("Ann\u2028Lee", "Ann\u2028Lee"),
        (" unanswerable\n", ""),
        ("unanswerable?", "unanswerable?"),
        ("", ""),
    ],
)
def test_clean_answer(generated, answer):
    assert clean_answer(generated) == answer


@pytest.mark.parametrize("style", ["t5", "decoder"])
def test_a_target_cleans_to_its_answer(style):
    assert clean_answer(qa_target("x ,", style)) == "x ,"
    assert clean_answer(qa_target(None, style)) == ""
