import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from babl.data.placing import place


@pytest.mark.parametrize(
    ("text", "offset", "context", "kind", "span"),
    [
        ("Bo", 4, "née Bo", "exact", (4, 6)),
        ("Mart", 3, "in Martens", "exact", (3, 7)),  # where the file says, though inside a word
        ("two  words", 2, "a two words", "whitespace", (2, 11)),
        ("two words", 2, "a two\n\twords", "whitespace", (2, 12)),
        ("\ttwo ", 1, "a two words", "whitespace", (2, 5)),
        ("Köln", 3, "in Ko\u0308ln", "whitespace", (3, 8)),
        ("Ko\u0308ln", 3, "in Köln", "whitespace", (3, 7)),
        ("1/2", 0, "½", "not found", None),  # U+2044 is no slash
        ("12 km²", 3, "is 12\u00a0km2", "whitespace", (3, 9)),
        ("fine", 3, "is ﬁne", "whitespace", (3, 6)),
        ("한국", 0, "\u1112\u1161\u11ab\u1100\u116e\u11a8", "whitespace", (0, 6)),
        ("Bo", 5, "née Bo", "moved", (4, 6)),
        ("Bo", 3, "née Bo", "moved", (4, 6)),  # the space before it is not part of it
        ("Bo", 99, "née Bo", "moved", (4, 6)),
        ("a", 4, "a b c a", "moved", (6, 7)),  # the nearest
        ("a", 3, "a b c a", "moved", (0, 1)),  # of two as near the first
        ("7", 2, "1817 at 7", "moved", (8, 9)),  # a whole word before a nearer part of one
        ("81", 0, "1817", "moved", (1, 3)),
        ("i", 3, "a ﬁne day", "not found", None),  # half of a ligature
        ("e", 9, "cafe\u0301 e", "moved", (6, 7)),  # not the e under an accent
        ("7", None, "in 1817, aged 7", "exact", (14, 15)),
        ("7", -1, "in 1817, aged 7", "exact", (14, 15)),
        ("two  words", None, "a two words", "whitespace", (2, 11)),
        ("Peru", 0, "née Bo", "not found", None),
        (" ", 0, "née Bo", "not found", None),
        ("", 0, "née Bo", "not found", None),
        ("x", 0, "", "not found", None),
        ("巴黎", 9, "他住在巴黎。", "moved", (3, 5)),
    ],
)
def test_an_answer_is_placed(text, offset, context, kind, span):
    found = place(text, offset, context)
    assert (found.kind, None if found.start is None else (found.start, found.end)) == (kind, span)


@pytest.mark.parametrize(
    ("text", "offset", "ambiguous"), [("a", None, True), ("a", 0, False), ("c", None, False), ("b", None, False)]
)
def test_without_an_offset_several_places_are_told(text, offset, ambiguous):
    assert place(text, offset, "a bb a c b").ambiguous is ambiguous  # one whole word b, and parts of another


def canonical(text):
    return unicodedata.normalize("NFKD", " ".join(text.split()))


def letter(character):
    return character.isalnum() or unicodedata.combining(character) > 0


def expected(text, offset, context):
    """Every span of the context is looked at, and the rules are applied to those that read as the text does."""
    if context[offset : offset + len(text)] == text:
        return "exact", (offset, offset + len(text))
    spans = []
    for start in range(len(context)):
        for end in range(start + 1, len(context) + 1):
            span = context[start:end]
            if span == span.strip() and canonical(span) == canonical(text):
                cut = any(
                    0 < at < len(context) and letter(context[at - 1]) and letter(context[at]) for at in (start, end)
                )
                spans.append((cut, abs(start - offset), start, end))
    there = [span for span in spans if span[2] == offset]
    if there:
        return "whitespace", there[0][2:]
    return ("moved", min(spans)[2:]) if spans else ("not found", None)


WRITTEN = st.lists(
    st.sampled_from(["a", "b", "é", "e\u0301", "1", " ", "  ", "\n", "\u00a0", ".", "½", "ﬁ"]), max_size=12
)


@settings(max_examples=400, deadline=None)
@given(WRITTEN, st.integers(0, 12), st.integers(1, 5), st.integers(0, 14), st.sampled_from(["NFC", "NFD", "NFKC"]))
@example(["a", " ", "e\u0301", "b"], 2, 2, 0, "NFC")
def test_placing_is_what_looking_at_every_span_finds(pieces, first, length, offset, form):
    context = "".join(pieces)
    text = unicodedata.normalize(form, " ".join("".join(pieces[first : first + length]).split()))
    if not text or unicodedata.combining(text[0]):
        return
    found = place(text, offset, context)
    kind, span = expected(text, offset, context)
    assert found.kind == kind
    assert (None if found.start is None else (found.start, found.end)) == span
