"""The wording of questions, contexts and answers: training, evaluation and chat all read it from here."""

import functools
import json
import time
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from babl.errors import UserError
from babl.text.tokenizer import Tokenizer

Style = Literal["t5", "decoder", "chat"]  # "chat": a decoder's chat template around the question

NO_ANSWER = "unanswerable"
"""The target text of a question without an answer."""

ANSWER_END = ("\n",)
"""Where an answer to a question ends, whatever a model goes on to write: that counts neither in its time nor in its
probability."""

CLEAN_ANSWER_VERSION = 1
"""Raised whenever `clean_answer` changes: scores are comparable only under the same version."""


def qa_prompt(question: str, context: str | None, style: Style = "t5") -> str:
    """The question, with its context where there is one, in the words the model is trained on.

    Whitespace inside both passes through untouched. The decoder style ends at `Answer:`, without a
    space, because the space belongs to the first token of the answer (see `qa_target`).

    Args:
        question: The question x.
        context: The passage c, or None for the arm that sees the question alone.
        style: `t5` for encoder-decoders, `decoder` (context first) for decoder-only models, `chat` for what a user says
            to one with a chat template.

    Raises:
        UserError: `style` is none of these.
    """
    if style == "t5":
        return f"question: {question}" if context is None else f"question: {question} context: {context}"
    if style == "decoder":
        passage = "" if context is None else f"Context: {context}\n"
        return f"{passage}Question: {question}\nAnswer:"
    if style == "chat":
        return question if context is None else f"Context: {context}\n\n{question}"
    raise UserError(f"prompt style '{style}': expected 't5', 'decoder' or 'chat'")


def qa_target(answer: str | None, style: Style = "t5") -> str:
    """The text that follows `qa_prompt(..., style)`: the answer, or `NO_ANSWER` where there is none.

    In the decoder style it starts with a space and continues the prompt: encode it with
    `Tokenizer.encode_continuation`.

    Raises:
        UserError: `style` is none of `t5`, `decoder` and `chat`.
    """
    text = NO_ANSWER if answer is None else answer
    if style in ("t5", "chat"):
        return text
    if style == "decoder":
        return f" {text}"
    raise UserError(f"prompt style '{style}': expected 't5', 'decoder' or 'chat'")


def prompt_ids(
    texts: Sequence[str], tokenizer: Tokenizer, style: Style, before: Sequence["Message"] = ()
) -> list[list[int]]:
    """The ids a model reads for each prompt: EOS after it for an encoder, BOS, where there is one, before a decoder's.

    Training and every way of asking take them from here, so that what is asked begins as what was learned.

    Args:
        texts: Worded by `qa_prompt`, or a user's own.
        tokenizer: The model's.
        style: `chat` makes each text the last message of a conversation.
        before: What stands before each text: a system message for a chat template, worked examples (`worked_example`)
            for any decoder, an empty line after each.
    """
    if style == "chat":
        return [chat_ids([*before, Message(role="user", content=text)], tokenizer) for text in texts]
    start, end = ([], [tokenizer.eos_id]) if style == "t5" else (tokenizer.prefix_ids, [])
    head = "".join(m["content"] if m["role"] == "user" else m["content"] + "\n\n" for m in before)
    return [[*start, *ids, *end] for ids in tokenizer.encode_batch([head + text for text in texts])]


def continuation_ids(texts: Sequence[str], tokenizer: Tokenizer, style: Style) -> list[list[int]]:
    """The ids a model writes for each text that follows a prompt, such as `qa_target`'s, EOS at the end."""
    encoded = tokenizer.encode_batch(texts) if style == "t5" else [tokenizer.encode_continuation(t) for t in texts]
    return [[*ids, tokenizer.eos_id] for ids in encoded]


class Message(TypedDict):
    """One turn of a conversation; role is "system", "user" or "assistant"."""

    role: str
    content: str


def system_message(text: str) -> tuple[Message, ...]:
    """What a chat model is told before a conversation; nothing where the text is empty."""
    return (Message(role="system", content=text),) if text else ()


def worked_example(question: str, context: str | None, answer: str | None, style: Style) -> tuple[Message, Message]:
    """A question with its answer, None where it has none, as they stand before the question that is asked."""
    said = Message(role="user", content=qa_prompt(question, context, style))
    return said, Message(role="assistant", content=qa_target(answer, style))


def chat_ids(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """The ids that ask for the next answer in a conversation, by the tokenizer's own chat template.

    The template is code from a stranger and runs in jinja's sandbox. Its control tokens become control; the same
    characters typed by a user stay text.

    Raises:
        UserError: The template fails, or refuses the messages.
    """
    if not any(tokenizer.spells_control(message["content"]) for message in messages):
        return tokenizer.encode_chat(_render(messages, tokenizer))
    said = "".join(message["content"] for message in messages)
    mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in said)
    guarded = [Message(role=m["role"], content=tokenizer.guard(m["content"], mark)) for m in messages]
    return tokenizer.encode_chat(_render(guarded, tokenizer), mark)


def _render(messages: Sequence[Message], tokenizer: Tokenizer) -> str:
    """The conversation as the template writes it; transformers gives templates the same names."""
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
    written = {f"{name}_token": None if id is None else tokenizer.written(id) for name, id in ids.items()}
    names = {name: token for name, token in written.items() if token is not None}
    try:
        return _template(tokenizer.chat_template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **names
        )
    except Exception as error:  # of code that a stranger wrote, anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the model's chat template failed: {reason}") from None


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what a model is to learn of a conversation; what stands in it is rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja's name and type)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Returns what stands in the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _template(source: str) -> jinja2.Template:
    """The template, with what transformers gives templates, which are written for it."""

    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    return environment.from_string(source)


def clean_answer(text: str) -> str:
    """The answer in a generated text: its first line, stripped; empty where that is `NO_ANSWER`."""
    answer = text.split("\n", 1)[0].strip()
    return "" if answer == NO_ANSWER else answer
