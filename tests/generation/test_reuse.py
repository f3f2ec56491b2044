from hypothesis import given
from hypothesis import strategies as st

from babl.generation.reuse import draft, shared_prefixes


def test_a_draft_is_what_followed_the_longest_match():
    source = [1, 2, 3, 4, 9, 3, 5, 6]
    assert draft(source, [2, 3], 2) == [4, 9], "two tokens match, though the second stands again later"
    assert draft(source, [8, 3], 4) == [5, 6], "the last of equal matches, as far as it goes"
    assert draft(source, [7], 3) == [] == draft(source, [], 3) == draft(source, [3], 0)


def test_questions_on_one_paragraph_are_one_group():
    paragraph, other = list(range(100, 160)), list(range(200, 260))
    prompts = [[1, 2, *paragraph, 7], [1, 2, *other, 8], [1, 2, *paragraph, 9, 9], [1, 2, *paragraph]]
    groups = shared_prefixes(prompts)
    assert sorted((length, sorted(members)) for length, members in groups) == [(61, [0, 2, 3]), (62, [1])]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=60), max_size=12))
def test_every_prompt_is_in_one_group_whose_beginning_it_has(prompts):
    groups = shared_prefixes(prompts)
    assert sorted(i for _, members in groups for i in members) == list(range(len(prompts)))
    for length, members in groups:
        assert len({tuple(prompts[i][:length]) for i in members}) == 1
        assert all(len(prompts[i]) > length for i in members)
