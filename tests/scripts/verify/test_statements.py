"""Statements are read as they are written, and the table's worst row is the worst."""

import math

import pytest

from babl.errors import UserError
from babl.scripts.verify.statements import listed, parse
from babl.scripts.verify.table import Worst, failed, skipped, told


def test_patterns_are_the_shells_and_the_last_rate_counts():
    said = parse(["encoder.*", "*.bias"], ["*=0.5", "decoder.blocks.0.*=0.1"])
    assert said.fixes("encoder.blocks.0.mlp.wo.weight") and said.fixes("final_norm.bias")
    assert not said.fixes("my.encoder.weight")
    assert said.factor("decoder.blocks.0.mlp.wi.weight") == 0.1 and said.factor("shared.weight") == 0.5
    assert parse([], []).factor("shared.weight") == 1.0 and not parse([], []).states_rate("shared.weight")


@pytest.mark.parametrize("text", ["encoder.*", "=0.1", "a=b", "a=0", "a=-1", "a=nan", "a=inf"])
def test_a_rate_without_a_factor_is_bad_input(text):
    with pytest.raises(UserError, match="expected PATTERN=FACTOR"):
        parse([], [text])


def test_a_pattern_of_no_parameter_is_bad_input():
    with pytest.raises(UserError, match=r"--fixed encodre\.\*: no parameter is called so; their names begin with a, b"):
        parse(["encodre.*"], []).check(["b.weight", "a.weight"])


def test_parameters_are_listed_briefly():
    assert listed(["a", "b", "c"], 26) == "3 of 26 parameters (a, b, ...)"


def test_the_worst_is_the_one_furthest_over_its_own_bound():
    worst = Worst(1e-5)
    worst.add(9e-6, "near")
    worst.add(1e-2, "noise", bound=1.0)
    assert worst.row("check", "case").note == "near" and worst.row("check", "case").verdict == "ok"
    worst.add(2e-5, "over")
    worst.add(0.9, "more noise", bound=1.0)
    assert worst.row("check", "case").note == "over" and worst.row("check", "case").verdict == "WRONG"
    worst.add(math.nan, "no number")
    row = worst.row("check", "case")
    assert row.note == "no number" and row.verdict == "WRONG" and row.difference is None


def test_what_is_exact_allows_nothing():
    worst = Worst(0.0)
    worst.add(0.0, "the same")
    assert worst.row("check", "case").verdict == "ok"
    worst.add(1e-300, "a bit")
    assert worst.row("check", "case").verdict == "WRONG"


def test_rows_say_what_they_are():
    verdicts = [make("check", "case", "why").verdict for make in (failed, skipped, told)]
    assert verdicts == ["WRONG", "not run", "note"]
