"""The scripted engine does what its prompts say."""

import os
import time

import pytest

from babl.web.engine.protocol import Delta, Failed, Loading, Queued, Reading


@pytest.fixture
def scripted(started):
    return started(scripted=True, max_waiting=2, max_running=2)


def test_it_writes_so_many_words_so_slowly(scripted, answer, chat, ask):
    begun = time.monotonic()
    (events,) = answer(scripted, chat("scripted", "tokens=6 delay=0.05 loading=0.1 reading=0.1 yes no"))
    assert 0.5 <= time.monotonic() - begun < 2
    assert [type(event) for event in events[:3]] == [Queued, Loading, Reading]
    assert [event.tokens for event in events if isinstance(event, Delta)] == [1, 2, 3, 4, 5, 6]
    assert events[-1].text == "yes no yes no yes no" and events[-1].finish == "eos"
    (events,) = answer(scripted, ask("scripted", "delay=0 who?", "🦊 the fox reads", max_new_tokens=2))
    assert (events[-1].text, events[-1].span, events[-1].finish) == ("🦊 the", (0, 5), "length")


def test_it_fails_on_demand(scripted, loop, answer, chat):
    (events,) = answer(scripted, chat("scripted", "after=2 fail=busy delay=0 a b c"))
    assert "".join(event.text for event in events if isinstance(event, Delta)) == "a b"
    assert (events[-1].code, events[-1].retry_after) == ("busy", 1.0)
    pid = scripted.pid
    (events,) = answer(scripted, chat("scripted", "fail=crash after=1"))
    assert isinstance(events[-1], Failed) and events[-1].code == "engine"
    (events,) = answer(scripted, chat("scripted", "tokens=1 delay=0 a"))
    assert events[-1].text == "a" and scripted.pid != pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert answer(scripted, chat("other", "a"))[0][-1].code == "model"


def test_its_queue_is_bounded_and_users_take_turns(scripted, answer, chat):
    requests = [chat("scripted", "tokens=3 delay=0.02 a", user=user) for user in "aaabc"]
    ends = [events[-1] for events in answer(scripted, *requests)]
    assert [isinstance(end, Failed) and end.code for end in ends] == [False] * 4 + ["busy"]


def test_words_that_only_look_like_settings_are_the_answer(scripted, answer, chat):
    (events,) = answer(scripted, chat("scripted", "tokens=2 delay=0 tokens=x <b>"))
    assert events[-1].text == "tokens=x <b>"
