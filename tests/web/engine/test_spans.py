import pytest
from hypothesis import given
from hypothesis import strategies as st

from babl.web.engine.spans import locate


def found(answer, context, window=None):
    span = locate(answer, context, window)
    return None if span is None else context[slice(*span)]


def test_offsets_are_code_points_behind_an_emoji():
    context = "🏳️‍🌈👩‍👩‍👧 née Zoë lives in Zürich."
    span = locate("Zürich", context)
    assert span == (context.index("Zürich"), context.index("Zürich") + 6)
    assert span[0] < len(context[: span[0]].encode("utf-16-le")) // 2, "UTF-16 units would lie further right"


@pytest.mark.parametrize(
    ("answer", "context", "expected"),
    [
        ("  the Old   Town ", "In the old\ntown they met.", "old\ntown"),
        ("U.S", "He left the U.S. in 1914.", "U.S"),
        ("12,000", "about 12,000 people", "12,000"),
        ("1914–18", "in 1914 - 18.", "1914 - 18"),
        ("the Nile", "Along a Nile in flood", "Nile"),
        ("final", "the ﬁnal word", "ﬁnal"),
        ("東京", "首都は東京です", "東京"),
        ("STRASSE", "die Straße", "Straße"),
    ],
)
def test_the_same_words_are_found_though_spelled_otherwise(answer, context, expected):
    assert found(answer, context) == expected


def test_whole_words_come_before_parts_of_words():
    context = "Many men, one man."
    assert locate("man", context) == (14, 17)
    assert found("Man", context) == "Man", "a part of a word, where the characters are the same"


def test_of_several_places_the_one_the_model_saw_is_taken():
    context = "red ball, blue ball, green ball"
    second, third = context.index("ball", 10), context.rindex("ball")
    assert locate("ball", context) == (4, 8)
    assert locate("ball", context, (10, 20))[0] == second
    assert locate("ball", context, (second + 1, len(context)))[0] == third
    assert locate("red", context, (10, 20)) == (0, 3), "outside of the window is better than nowhere"


@pytest.mark.parametrize("answer", ["", "   ", "the", "...", "purple", "redball"])
def test_what_is_nowhere_has_no_span(answer):
    assert locate(answer, "red ball, blue ball") is None


@given(st.text(), st.text(min_size=1), st.text())
def test_what_is_in_the_context_is_found_as_it_is(before, answer, after):
    span = locate(answer, before + answer + after)
    if answer.strip():
        assert (before + answer + after)[slice(*span)] == answer.strip()
