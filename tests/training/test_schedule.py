import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from babl.training.schedule import Schedule, learning_rate


@pytest.mark.parametrize("schedule", typing.get_args(Schedule))
@given(step=st.integers(1, 10**7), steps=st.integers(1, 10**6), warmup=st.integers(0, 10**6), peak=st.floats(0, 10))
def test_a_rate_is_never_outside_of_zero_and_its_peak(schedule, step, steps, warmup, peak):
    assert 0.0 <= learning_rate(schedule, peak, step, steps, warmup) <= peak


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("cosine", [0.5, 1, 0.8535533905932737, 0.5, 0.14644660940672624, 0, 0]),
        ("rsqrt", [0.5, (2 / 3) ** 0.5, (2 / 4) ** 0.5, (2 / 5) ** 0.5, (2 / 6) ** 0.5, (2 / 7) ** 0.5, 0.5]),
        ("trapezoid", [0.5, 1, 1, 1, 0.625, 0, 0]),
    ],
)
def test_the_rates_of_six_steps_two_of_warmup_and_of_two_more(schedule, expected):
    steps = [1, 3, 4, 5, 6, 7, 8]
    assert [learning_rate(schedule, 1.0, step, 6, 2) for step in steps] == pytest.approx(expected)
