"""Real engine processes: their answers, their ends, and what of them is left."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict

import msgspec
import psutil
import pytest
from safetensors.torch import load_file, save_file

from babl.generation import GenerationConfig
from babl.models.build import ModelConfig, build_model
from babl.models.weights import save_pretrained
from babl.text import train_tokenizer
from babl.web.engine import client as client_module
from babl.web.engine.channel import Channel
from babl.web.engine.client import EngineClient, EngineError
from babl.web.engine.protocol import Cancel, Delta, Done, Failed, FromEngine, Loading, Queued, Reading, Ready, Settings

FAMILIES = ("t5", "llama", "bloom")
PARENT = """
import asyncio, sys
from babl.web.engine.client import EngineClient

async def main():
    client = EngineClient(scripted=True)
    await client.start()
    print(client.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def until(stream, kind):
    async for event in stream:
        if isinstance(event, kind):
            return event
    raise AssertionError(f"no {kind.__name__} came")


@pytest.mark.parametrize("model", FAMILIES)
def test_answers_through_the_process_are_the_engines(client, engines, answer, complete, chat, model):
    drawn = {"max_new_tokens": 10, "temperature": 1.1, "seed": 4}
    requests = [complete(model, "the small fox", **drawn), chat(model, "nobody asks", max_new_tokens=10)]
    first, second = answer(client, *requests)
    (expected,) = engines[model].answer([requests[0].prompt], GenerationConfig(**drawn))
    assert (first[-1].text, first[-1].tokens, first[-1].finish) == (expected.text, len(expected.ids), expected.finish)
    for events in (first, second):
        pieces = [event for event in events if isinstance(event, Delta)]
        assert "".join(piece.text for piece in pieces) == events[-1].text
        kinds = [type(event) for event in events if not isinstance(event, Delta)]
        assert kinds in ([Queued, Reading, Done], [Queued, Loading, Reading, Done])
    again = answer(client, requests[0])[0][-1], answer(client, requests[1])[0][-1]
    assert [done.text for done in again] == [first[-1].text, second[-1].text], "together as alone"


def test_models_are_listed_loaded_counted_and_refused(client, loop, chat, ask):
    states = {state.name: state for state in loop.run(client.models())}
    assert states["llama"].context == 256 and states["odd"].state == "unusable"
    loop.run(client.load("talks"))
    assert {s.name: s.state for s in loop.run(client.models())}["talks"] == "loaded"
    counted = loop.run(client.count(ask("bloom", "who reads?", "the fox reads. " * 200)))
    assert counted.windows > 1 and counted.cut_tokens == 0
    for call, code, message in (
        (client.load("odd"), "model", "model_type is 'gpt2'"),
        (client.count(chat("bloom", "x", "y")), "prompt", "the last message is not the user"),
    ):
        with pytest.raises(EngineError, match=message) as error:
            loop.run(call)
        assert error.value.code == code


def test_an_idle_process_uses_no_processor(client, loop):
    assert os.getpgid(client.pid) != os.getpgrp(), "nor does Ctrl-C reach it"
    process = psutil.Process(client.pid)
    before = sum(process.cpu_times()[:2])
    loop.run(asyncio.sleep(0.6))
    assert sum(process.cpu_times()[:2]) - before <= 0.03
    stats = loop.run(client.stats())
    assert (stats.waiting, stats.running, stats.pid) == (0, 0, client.pid)


def test_leaving_an_answer_or_cancelling_it_ends_it(client, loop, chat):
    async def leave():
        request = chat("bloom", "the fox", max_new_tokens=4000, temperature=2.0)
        stream = client.submit(request)
        with pytest.raises(ValueError, match="is being answered already"):
            client.submit(request)
        await until(stream, Delta)
        await stream.aclose()
        while (await client.stats()).running:
            await asyncio.sleep(0.01)
        stream = client.submit(chat("bloom", "the fox", max_new_tokens=4000, temperature=2.0))
        await until(stream, Delta)
        steps = (await client.stats()).steps
        await client.cancel((await anext(stream)).id)
        done = await until(stream, Done)
        assert done.finish == "cancelled" and (await client.stats()).steps - steps < 40
        await client.cancel("nobody")

    loop.run(leave())


def test_a_slow_reader_gets_all_the_text_in_few_pieces(client, loop, chat):
    async def read():
        request = chat("bloom", "the fox", max_new_tokens=200, temperature=2.0, seed=3)
        stream = client.submit(request)
        while request.id in client._streams:  # until it is whole
            await asyncio.sleep(0.01)
        return [event async for event in stream]

    events = loop.run(read())
    pieces = [event.text for event in events if isinstance(event, Delta)]
    assert len(pieces) == 1 and pieces[0] == events[-1].text


def test_a_killed_process_costs_its_answers_and_the_next_ones_work(started, loop, folder, chat, complete, answer):
    client = started(folder)
    pid = client.pid

    async def kill():
        streams = [client.submit(chat("bloom", "the fox", max_new_tokens=4000, temperature=2.0)) for _ in range(2)]
        await asyncio.gather(*(until(stream, Delta) for stream in streams))
        call = asyncio.create_task(client.load("t5"))
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        failures = [await until(stream, Failed) for stream in streams]
        with pytest.raises(EngineError, match="crashed"):
            await call
        held = [client.submit(complete("bloom", "the fox", max_new_tokens=3)) for _ in range(2)]
        await client.cancel(list(client._streams)[1])
        return failures, await until(held[0], Done), await until(held[1], Done)

    failures, answered, cancelled = loop.run(kill())
    assert {(failed.code, failed.message) for failed in failures} == {
        ("engine", "the engine crashed while it was answering, and is being restarted")
    }
    assert answered.tokens == 3 and cancelled.finish == "cancelled"
    assert client.restarts == 1 and client.pid != pid and gone(pid)


def test_unloading_the_last_model_gives_all_memory_back(started, loop, tmp_path, complete, answer):
    for name in ("one", "two"):
        train_tokenizer(["the small fox"], 300, tmp_path / name)
        shape = {"hidden_size": 512, "n_layer": 8, "n_head": 8}
        model, _ = build_model(ModelConfig("", "bloom", shape, str(tmp_path / name)), tmp_path / name, 0)
        save_pretrained(model, tmp_path / name)
    client = started(tmp_path)
    before, pid = loop.run(client.stats()).rss, client.pid
    answer(client, complete("one", "fox", max_new_tokens=2), complete("two", "fox", max_new_tokens=2))
    loaded = loop.run(client.stats()).rss
    assert loaded > before + 2 * (80 << 20)
    loop.run(client.unload("one"))
    half = loop.run(client.stats())
    assert half.pid == pid and half.rss < loaded - (70 << 20)

    async def unload():  # while others ask, and one comes in the middle
        calls = [asyncio.create_task(client.models()) for _ in range(3)]
        unloading = asyncio.create_task(client.unload("two"))
        while not client._replacing:
            await asyncio.sleep(0)
        held = client.submit(complete("absent", "fox"))
        await unloading
        return [await call for call in calls], await until(held, Failed)

    listed, failed = loop.run(unload())
    assert all(len(states) == 2 for states in listed) and failed.code == "model"
    after = loop.run(client.stats())
    print(f"rss in MiB: {before >> 20} before, {loaded >> 20} loaded, {half.rss >> 20} half, {after.rss >> 20} after")
    assert abs(after.rss - before) <= 0.05 * before
    assert after.pid != pid and client.restarts == 0
    assert answer(client, complete("one", "fox", max_new_tokens=2))[0][-1].tokens == 2


def test_the_process_ends_when_its_parent_is_gone():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(parent.stdout.readline())
        assert not gone(pid)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: gone(pid))


def test_who_asks_for_the_memory_may_go_away(started, loop, answer, chat):
    client = started(scripted=True)
    loop.run(client.load("scripted"))
    pid = client.pid

    async def leave():
        unloading = asyncio.create_task(client.unload("scripted"))
        while not client._replacing:
            await asyncio.sleep(0)
        unloading.cancel()
        return await client.models()

    assert [state.state for state in loop.run(leave())] == ["unloaded"] and client.pid != pid

    async def load_in_the_middle():
        await client.load("scripted")
        unloading = asyncio.create_task(client.unload("scripted"))
        loading = asyncio.create_task(client.load("scripted"))
        await asyncio.gather(unloading, loading)
        return await client.models()

    pid = client.pid
    assert [state.state for state in loop.run(load_in_the_middle())] == ["loaded"] and client.pid == pid
    assert answer(client, chat("scripted", "tokens=1 delay=0 a"))[0][-1].text == "a"


@pytest.fixture
def process(loop, tmp_path):
    """A scripted engine process at a socket of the test: its channel, the messages it sends, and the process."""
    messages, channels = asyncio.Queue(), asyncio.Queue()

    async def start():
        def channel():
            return Channel(
                FromEngine, messages.put_nowait, lambda error: messages.put_nowait(None), channels.put_nowait
            )

        server = await asyncio.get_running_loop().create_unix_server(channel, str(tmp_path / "socket"))
        command = [sys.executable, "-m", "babl.web.engine.process", "--socket", str(tmp_path / "socket"), "--scripted"]
        started = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        assert isinstance(await messages.get(), Ready)
        return server, await channels.get(), started

    server, channel, started = loop.run(start())
    yield channel, messages, started
    if started.returncode is None:
        started.kill()
    loop.run(started.wait())
    server.close()


def test_sigterm_cancels_all_answers_and_ends_the_process(process, loop, chat):
    channel, messages, started = process

    async def terminate():
        requests = [chat("scripted", "tokens=1000 delay=0.01 a b") for _ in range(40)]
        for request in requests:
            channel.send(request)
        while not isinstance(await messages.get(), Delta):
            pass
        started.terminate()
        ends = {}
        while (message := await messages.get()) is not None:
            if isinstance(message, Done):
                ends[message.id] = message.finish
        assert ends == {request.id: "cancelled" for request in requests}
        return await started.wait()

    assert loop.run(terminate()) == 0


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\0\0\0\x02\xc1\xc1", b"\0\0\0\0"])
def test_a_process_that_is_sent_no_message_says_so_and_ends(process, loop, data):
    channel, messages, started = process

    async def send():
        channel._transport.write(data)
        assert await messages.get() is None
        return await started.wait(), (await started.stderr.read()).decode()

    status, said = loop.run(send())
    assert status == 1 and said.startswith("babl engine: a frame") and "Traceback" not in said


def test_the_process_waits_for_who_does_not_keep_up(process, loop, chat):
    channel, messages, started = process

    def used():
        times = psutil.Process(started.pid).cpu_times()
        return times.user + times.system

    async def read_late():
        channel._transport.pause_reading()
        for _ in range(8):
            channel.send(chat("scripted", "tokens=8192 delay=0 word", max_new_tokens=8192))
        before = -1.0
        while used() > before:  # until its buffers are full
            before = used()
            await asyncio.sleep(0.3)
        assert messages.qsize() == 0
        channel._transport.resume_reading()
        texts, ends = defaultdict(str), {}
        while len(ends) < 8:
            message = await messages.get()
            if isinstance(message, Delta):
                texts[message.id] += message.text
            elif isinstance(message, Done):
                ends[message.id] = message
        assert all(end.tokens == 8192 and end.text == texts[id] for id, end in ends.items())
        return before, used()

    blocked, whole = loop.run(read_late())
    assert blocked < 0.7 * whole, "most of it was written after we read on"


def test_a_cancel_of_an_unknown_request_changes_nothing(process, loop, chat):
    channel, messages, _ = process

    async def send():
        channel.send(Cancel("nobody"))
        channel.send(chat("scripted", "tokens=1 delay=0 a"))
        while not isinstance(message := await messages.get(), Done):
            pass
        return message.text

    assert loop.run(send()) == "a"


@pytest.mark.parametrize("program", ["/bin/false", "/absent"])
def test_an_engine_that_cannot_be_started_keeps_nobody_waiting(program, loop, monkeypatch, chat, answer):
    monkeypatch.setattr(client_module, "RESTART_DELAYS", (0.0, 0.0))
    python = sys.executable
    monkeypatch.setattr(sys, "executable", program)
    client = EngineClient(scripted=True)
    with pytest.raises(EngineError, match="the engine cannot be started"):
        loop.run(client.start())
    (events,) = answer(client, chat("scripted", "x"))
    assert [(event.code, "cannot be started" in event.message) for event in events] == [("engine", True)]
    monkeypatch.setattr(sys, "executable", python)

    async def ready():  # it is tried again all the time
        while client.pid is None:
            await asyncio.sleep(0.01)

    loop.run(asyncio.wait_for(ready(), 20))
    assert answer(client, chat("scripted", "tokens=1 a"))[0][-1].text == "a"
    loop.run(client.stop())
    (events,) = answer(client, chat("scripted", "x"))
    assert (events[-1].code, events[-1].message) == ("engine", "the engine is not started")


def test_a_long_tmpdir_costs_nothing_and_one_that_is_gone_is_said(loop, monkeypatch, chat, answer, tmp_path):
    long = tmp_path / ("a" * 60) / ("b" * 60)
    long.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    client = EngineClient(scripted=True)
    loop.run(client.start())
    assert answer(client, chat("scripted", "tokens=1 a"))[0][-1].text == "a"
    loop.run(client.stop())
    assert not list(long.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    client = EngineClient(scripted=True)
    with pytest.raises(EngineError, match=r"socket cannot be created .*set TMPDIR to a writable folder"):
        loop.run(client.start())
    (events,) = answer(client, chat("scripted", "x"))
    assert events[-1].code == "engine" and "set TMPDIR" in events[-1].message
    loop.run(client.stop())


@pytest.mark.parametrize(("name", "value"), [("seed", 10**20), ("temperature", "hot"), ("stop", ["\ud800"])])
def test_a_frame_that_cannot_be_sent_or_read_ends_its_request_alone(started, loop, chat, name, value):
    client = started(scripted=True)
    wrong = chat("scripted", "a")
    msgspec.structs.force_setattr(wrong.settings, name, value)  # as if nobody had checked it

    async def ask():
        others = client.submit(chat("scripted", "tokens=30 delay=0.02 b"))
        async for event in others:
            if isinstance(event, Delta):
                break
        pid, (failed,) = client.pid, [event async for event in client.submit(wrong)]
        with pytest.raises(EngineError) as counting:
            await client.count(wrong)
        end = [event async for event in others][-1]
        assert (failed.code, counting.value.code) == ("prompt", "prompt") and end.finish == "eos"
        assert client.pid == pid and client.restarts == 0
        os.kill(pid, signal.SIGKILL)
        while client.restarts == 0 or client.pid is None:
            await asyncio.sleep(0.02)
        return [event async for event in client.submit(chat("scripted", "tokens=1 delay=0 c"))][-1].text

    assert loop.run(asyncio.wait_for(ask(), 30)) == "c", "the new process is not handed the wrong frame again"


def test_a_file_written_over_or_cut_changes_no_model_in_memory(started, tmp_path, make_model, answer, complete, loop):
    file = make_model("bloom", tmp_path / "models" / "one", seed=1) / "model.safetensors"
    other = (make_model("bloom", tmp_path / "other", seed=2) / "model.safetensors").read_bytes()
    client, first = started(tmp_path / "models"), hashlib.sha256(file.read_bytes()).hexdigest()[:12]

    def told(number=12):
        (events,) = answer(client, complete("one", "the small fox", max_new_tokens=number))
        return events[-1].text, events[-1].log_prob, events[-1].weights

    before = told()
    assert before[2] == first and len(other) == file.stat().st_size
    with file.open("r+b") as in_place:
        in_place.write(other)
    assert told() == before
    with file.open("r+b") as in_place:
        in_place.truncate(1000)
    assert told() == before and client.restarts == 0
    file.write_bytes(other)
    loop.run(client.unload("one"))
    after = told()
    assert after[1] != before[1] and after[2] == hashlib.sha256(other).hexdigest()[:12]


def test_a_model_whose_logits_are_no_numbers_fails_by_name(started, tmp_path, make_model, answer, complete):
    tensors = load_file(make_model("llama", tmp_path / "odd") / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "odd" / "model.safetensors", metadata={"format": "pt"})
    make_model("llama", tmp_path / "sound")
    client = started(tmp_path)
    odd, sound = answer(client, complete("odd", "the fox"), complete("sound", "the fox", max_new_tokens=4))
    assert (odd[-1].code, sound[-1].tokens) == ("broken", 4) and client.restarts == 0
    assert odd[-1].message.startswith("odd: logits after 0 tokens of the answer are not finite")


def test_odd_folders_hide_no_others(started, tmp_path, make_model, loop, answer, complete):
    make_model("t5", tmp_path / "sound")
    configs = {"array": "[]", "deep": "[" * 100_000, "null": "null", "half": '{"model_type": "t5"'}
    configs |= {"sizes": '{"model_type": "t5", "d_model": "wide"}', os.fsdecode(b"not\xffutf"): "{}"}
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    client = started(tmp_path)
    states = {state.name: state for state in loop.run(asyncio.wait_for(client.models(), 20))}
    assert {name for name, state in states.items() if state.state != "unusable"} == {"sound"} and len(states) == 7
    assert all(state.reason and "\n" not in state.reason for name, state in states.items() if name != "sound")
    assert states["not\\xffutf"].reason.endswith("is not UTF-8; rename it")
    wrong, right = answer(client, complete("not\\xffutf", "x"), complete("sound", "the fox", max_new_tokens=2))
    assert wrong[-1].code == "model" and "rename it" in wrong[-1].message and right[-1].tokens <= 2


def test_a_request_too_long_for_a_frame_is_refused(client, answer, complete, monkeypatch):
    monkeypatch.setattr("babl.web.engine.protocol.MAX_FRAME", 1000)
    (events,) = answer(client, complete("bloom", "x" * 2000))
    assert events[-1].code == "prompt" and "expected at most 1000" in events[-1].message
    assert Settings().max_new_tokens == 256
