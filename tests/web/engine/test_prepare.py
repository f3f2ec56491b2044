"""What a model reads of a request, and what of it is cut."""

import pytest

from babl.errors import UserError
from babl.generation.conversation import MOST_PROMPT, Reader
from babl.models.weights import describe
from babl.text.prompts import prompt_ids, qa_prompt
from babl.web.engine.prepare import prepare
from babl.web.engine.protocol import ChatRequest, Message

LONG = "the small fox reads a long book about old rivers and the town. " * 12


@pytest.fixture(scope="module")
def readers(folder):
    names = ("t5", "llama", "bloom", "talks")
    known = {name: describe(folder / name) for name in names}
    return {name: Reader.of(folder / name, known[name]["family"], known[name]["context"]) for name in names}


def texts(prepared, reader):
    return [reader.tokenizer.decode(ids) for ids in prepared.prompts]


def test_a_question_is_worded_as_in_training(readers, ask):
    for name, style in (("t5", "t5"), ("llama", "decoder"), ("bloom", "decoder")):
        for context in (None, "the book"):
            found = prepare(ask(name, "who reads", context), readers[name])
            assert found.prompts == prompt_ids([qa_prompt("who reads", context, style)], readers[name].tokenizer, style)
            assert (found.windows, found.cut_tokens) == ([(0, len(context or ""))], 0)
            assert found.config.prompt_lookup_num_tokens > 0


def test_a_long_context_is_read_through_windows_and_nothing_of_it_is_cut(readers, ask):
    found = prepare(ask("llama", "who reads?", LONG), readers["llama"])
    assert len(found.prompts) > 1 and found.cut_tokens == 0
    assert max(map(len, found.prompts)) <= found.limit == 256 - 64, "the answer has room in the model's context"
    assert found.windows[0][0] == 0 and found.windows[-1][1] == len(LONG)
    assert all(b[0] < a[1] for a, b in zip(found.windows, found.windows[1:], strict=False)), "they overlap"
    counted = found.count()
    assert (counted.windows, counted.prompt_tokens) == (len(found.prompts), sum(map(len, found.prompts)))


def test_a_run_says_how_its_questions_were_windowed(folder, tmp_path, ask):
    for path in (folder / "t5").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "run.toml").write_text("[data]\nmax_source_tokens = 40\nstride = 8\n")
    reader = Reader.of(tmp_path, "t5", None)
    assert (reader.window, reader.stride) == (40, 8)
    assert max(map(len, prepare(ask("m", "who?", LONG), reader).prompts)) <= 40
    (tmp_path / "run.toml").write_text("[data]\nstride = 8\n")
    with pytest.raises(UserError, match=r"run\.toml: not the configuration of a run"):
        Reader.of(tmp_path, "t5", None)


def test_t5_reads_the_last_question_with_the_passage_or_the_system_message(readers, chat):
    reader = readers["t5"]
    first, answer, system = "who asks", "nobody", "the town"
    for context, seen in ((None, "the town"), ("the river", "the river")):
        found = prepare(chat("t5", first, answer, "who reads", system=system, context=context), reader)
        assert texts(found, reader) == [f"question: who reads context: {seen}"]
        unread = [first, answer] + ([system] if context else [])
        assert found.cut_tokens == sum(len(reader.tokenizer.encode(text)) for text in unread)
    alone = prepare(chat("t5", "who reads"), reader)
    assert texts(alone, reader) == ["question: who reads"] and alone.cut_tokens == 0


def test_a_base_decoder_reads_the_last_question_as_in_training(readers, chat):
    reader = readers["bloom"]
    assert texts(prepare(chat("bloom", "the fox"), reader), reader) == ["Question: the fox\nAnswer:"]
    told = prepare(chat("bloom", "the fox", "reads", "a book", system="old"), reader)
    assert texts(told, reader) == ["Question: a book\nAnswer:"]
    assert told.cut_tokens == sum(len(reader.tokenizer.encode(text)) for text in ("the fox", "reads", "old"))
    asked = prepare(chat("bloom", "who reads", context="the fox"), reader)
    assert texts(asked, reader) == ["Context: the fox\nQuestion: who reads\nAnswer:"]


def test_a_chat_template_words_all_and_the_oldest_give_way(readers, chat):
    reader = readers["talks"]
    said = [f"the book {'about old rivers ' * 5}{i}" for i in range(9)]
    short = prepare(chat("talks", *said[:3], system="be kind", context="the town", max_new_tokens=8), reader)
    (text,) = texts(short, reader)
    assert "be kind" in text and f"Context: the town\n\n{said[2]}" in text and short.cut_tokens == 0
    cut = prepare(chat("talks", *said, system="be kind", max_new_tokens=8), reader)
    (text,) = texts(cut, reader)
    assert "be kind" in text and said[8] in text and said[0] not in text
    assert len(cut.prompts[0]) <= cut.limit == 256 - 8
    kept = [i for i in range(9) if said[i] in text]
    fuller = prepare(chat("talks", *said[kept[0] - 2 :], system="be kind", max_new_tokens=1), reader)
    assert kept == list(range(kept[0], 9)) and kept[0] % 2 == 0 and len(fuller.prompts[0]) > cut.limit - 40
    whole = prepare(chat("talks", *said, system="be kind"), Reader(reader.tokenizer, "decoder"))
    assert cut.cut_tokens == whole.tokens - cut.tokens > 0
    assert (cut.count().cut_tokens, cut.count().prompt_tokens) == (cut.cut_tokens, cut.tokens)


def test_what_cannot_be_cut_is_counted_and_refused(readers, complete, chat):
    too_long = prepare(complete("llama", LONG * 2), readers["llama"])
    assert too_long.count().prompt_tokens == too_long.count().limit == 255
    assert too_long.count().cut_tokens == len(too_long.prompts[0]) - 255
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, but this model reads at most 255"):
        too_long.check()
    with pytest.raises(UserError, match=f"but this model reads at most {MOST_PROMPT}"):
        prepare(chat("bloom", LONG * 20), readers["bloom"]).check()


def test_an_empty_prompt_is_read_where_there_is_a_token_to_begin_with(readers, complete):
    prepare(complete("t5", ""), readers["t5"]).check()
    with pytest.raises(UserError, match="the prompt is empty, and this model has no token to begin with"):
        prepare(complete("bloom", ""), readers["bloom"]).check()


def test_what_is_no_conversation_is_refused(readers, chat, ask):
    with pytest.raises(UserError, match="the last message is not the user's"):
        prepare(chat("bloom", "the fox", "reads"), readers["bloom"])
    with pytest.raises(UserError, match="the last message is not the user's"):
        prepare(chat("bloom"), readers["bloom"])
    request = ChatRequest("1", "bloom", [Message("tool", "x"), Message("user", "y")])
    with pytest.raises(UserError, match="a message's role is 'tool', expected one of system, user, assistant"):
        prepare(request, readers["bloom"])
    with pytest.raises(UserError, match="the question leaves too little room for its context: this model reads 192"):
        prepare(ask("llama", LONG, LONG), readers["llama"])
    with pytest.raises(UserError, match=r"the context takes \d+ windows of 192 tokens, expected at most 256"):
        prepare(ask("llama", "who?", LONG * 200), readers["llama"])
