from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from babl.web.engine.fair_queue import FairQueue


@dataclass
class Item:
    id: str
    user: str


def filled(users):
    turns = FairQueue()
    for i, user in enumerate(users):
        turns.add(Item(f"{user}{i}", user))
    return turns


def drain(turns, may=lambda item: True):
    taken = []
    while (item := turns.take(may)) is not None:
        taken.append(item.id)
    return taken


def test_users_take_turns_however_much_one_asks():
    turns = filled("aaaabac")
    assert [item.id for item in turns] == ["a0", "b4", "c6", "a1", "a2", "a3", "a5"]
    assert drain(turns) == ["a0", "b4", "c6", "a1", "a2", "a3", "a5"] and len(turns) == 0


def test_who_was_answered_last_comes_last():
    turns = filled("aab")
    assert turns.take(lambda item: True).id == "a0"
    turns.add(Item("c", "c"))
    assert drain(turns) == ["b2", "a1", "c"], "c came when it was b's and a's turn"


def test_who_may_not_go_keeps_the_place():
    turns = filled("aab")
    assert drain(turns, lambda item: item.user == "b") == ["b2"]
    assert drain(turns) == ["a0", "a1"]


def test_one_can_leave():
    turns = filled("aab")
    assert turns.remove("a0").id == "a0" and turns.remove("a0") is None
    assert drain(turns) == ["a1", "b2"]


@given(st.lists(st.sampled_from("abcd"), max_size=30))
def test_the_order_told_is_the_order_kept(users):
    told = [item.id for item in filled(users)]
    assert drain(filled(users)) == told and len(told) == len(users)
    of_b = [id for id in told if id.startswith("b")]
    assert of_b == sorted(of_b, key=lambda id: int(id[1:])), "a user's own requests keep their order"
