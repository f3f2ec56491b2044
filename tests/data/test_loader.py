import pytest
from hypothesis import given
from hypothesis import strategies as st

from babl.data.loader import BatchConfig, Loader, padded, plan_epoch
from babl.errors import UserError

LENGTHS = [(20 + (i * 37) % 140, 2 + (i * i) % 5) for i in range(4000)]  # paragraphs
SHORT = [(8 + (i * 37) % 17, 2 + (i * i) % 9) for i in range(20_000)]  # questions alone
SIZES = [source for source, _ in LENGTHS]


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 10)), min_size=1, max_size=300),
    st.integers(60, 500),
    st.integers(0, 3),
)
def test_an_epoch_has_every_example_once_within_the_budget(lengths, budget, epoch):
    batches = plan_epoch(lengths, budget, seed=1, epoch=epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(padded(lengths, [batch]) <= budget for batch in batches)


@pytest.mark.parametrize("lengths", [LENGTHS, SHORT], ids=["paragraphs", "questions"])
def test_padding_stays_below_five_percent(lengths):
    batches = plan_epoch(lengths, 4000, seed=0, epoch=0)
    assert 1 - sum(map(sum, lengths)) / padded(lengths, batches) < 0.05


def test_epochs_and_seeds_differ_and_repeat():
    assert plan_epoch(LENGTHS, 4000, 0, 0) == plan_epoch(LENGTHS, 4000, 0, 0)
    assert plan_epoch(LENGTHS, 4000, 0, 0) != plan_epoch(LENGTHS, 4000, 0, 1) != plan_epoch(LENGTHS, 4000, 1, 1)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_a_step_has_the_same_examples_however_it_is_dealt(world, accumulation):
    whole = Loader(LENGTHS, SIZES, BatchConfig(4000, accumulation=1), 0, 0, 1)
    ranks = [
        Loader(LENGTHS, SIZES, BatchConfig(4000, accumulation=accumulation), 0, rank, world) for rank in range(world)
    ]
    for _ in range(130):  # over the end of an epoch
        (expected,) = whole.next_step()
        dealt = [index for rank in ranks for micro in rank.next_step() for index in micro]
        assert sorted(dealt) == sorted(expected)


def test_it_goes_on_where_its_state_says():
    a, b = (
        Loader(LENGTHS, SIZES, BatchConfig(4000, accumulation=2), 0, 0, 1),
        Loader(LENGTHS, SIZES, BatchConfig(4000, accumulation=2), 0, 0, 1),
    )
    for _ in range(110):
        a.next_step()
    b.restore(a.state())
    assert [a.next_step() for _ in range(40)] == [b.next_step() for _ in range(40)]


def test_an_example_beyond_the_budget_is_named():
    with pytest.raises(UserError, match=r"batch\.tokens is 100, but the longest example has 165 tokens"):
        Loader(LENGTHS, SIZES, BatchConfig(100, accumulation=1), 0, 0, 1)


@pytest.mark.parametrize(
    ("lengths", "cfg", "seed"),
    [
        (LENGTHS, BatchConfig(4000), 1),
        (LENGTHS, BatchConfig(5000), 0),
        (LENGTHS[1:], BatchConfig(4000), 0),
        ([(source + 1, target) for source, target in LENGTHS], BatchConfig(4000), 0),
        (LENGTHS, BatchConfig(4000, examples=32), 0),
    ],
    ids=["seed", "budget", "number", "lengths", "examples a step"],
)
def test_a_place_in_another_order_is_refused(lengths, cfg, seed):
    state = Loader(LENGTHS, SIZES, BatchConfig(4000), 0, 0, 1).state()
    with pytest.raises(UserError, match=r"run\.resume: the examples come in another order"):
        Loader(lengths, SIZES[-len(lengths) :], cfg, seed, 0, 2).restore(state)


def test_a_place_is_the_same_on_every_rank_and_in_every_number_of_parts():
    whole, dealt = (Loader(LENGTHS, SIZES, BatchConfig(4000, accumulation=n), 0, n - 1, n) for n in (1, 2))
    whole.next_step()
    dealt.restore(whole.state())
    assert set(dealt.next_step()[0]) < set(whole.next_step()[0])


@pytest.mark.parametrize("cfg", [BatchConfig(tokens=10**9), BatchConfig(examples=10**6)], ids=["tokens", "examples"])
def test_where_the_batch_is_larger_than_the_set_a_step_is_an_epoch(cfg):
    ranks = [Loader(LENGTHS[:3], SIZES[:3], cfg, 0, rank, 5) for rank in range(5)]
    for _ in range(3):
        parts = [part for loader in ranks for part in loader.next_step()]
        assert sorted(i for part in parts for i in part) == [0, 1, 2] and len(parts) == 5, (
            "two ranks have nothing to do"
        )


def test_a_step_of_so_many_examples_does_not_depend_on_their_lengths():
    cfg = BatchConfig(tokens=1, examples=32, accumulation=2)
    long, short = Loader(LENGTHS, SIZES, cfg, 0, 0, 1), Loader([(1, 1)] * len(LENGTHS), SIZES, cfg, 0, 0, 1)
    seen = []
    for _ in range(-(-len(LENGTHS) // 32)):
        step = long.next_step()
        assert step == short.next_step() and len(step) == 2
        seen += [index for part in step for index in part]
    assert sorted(seen) == list(range(len(LENGTHS))), "an epoch has each once, its last step what is left"
    assert len(long.longest()) == 16
