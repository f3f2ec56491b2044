import itertools

from hypothesis import given
from hypothesis import strategies as st

from babl.generation.reuse import common_prefix, draft, read_once, shared_prefixes


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


def test_examples_before_all_are_read_once_and_then_each_paragraph():
    examples, one, other = list(range(300, 400)), list(range(100, 160)), list(range(200, 260))
    prompts = [[*examples, *one, 7], [*examples, *other, 8], [*examples, *one, 9, 9], [*examples, *one]]
    assert common_prefix(prompts) == 100
    (first, _), (second, after_first), (last, after_second) = read_once(prompts)
    assert first == [examples] and last == prompts
    assert sorted(map(len, second)) == [159, 160] and after_first == [0, 0]
    assert [second[i][100] for i in after_second] == [100, 200, 100, 100]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=60), min_size=1, max_size=12), st.integers(0, 40))
def test_what_is_read_in_steps_is_the_prompts(prompts, alike):
    prompts = [[9] * alike + prompt for prompt in prompts]
    steps = read_once(prompts)
    assert steps[-1][0] == prompts
    for (before, _), (rows, parents) in itertools.pairwise(steps):
        more = [len(row) - len(before[parent]) for row, parent in zip(rows, parents, strict=True)]
        assert all(row[: len(before[parent])] == before[parent] for row, parent in zip(rows, parents, strict=True))
        assert max(more) > 0 and (rows is not prompts or min(more) > 0)
