"""The scheduler, turned by hand: what is answered, in which order, and how soon a cancel is seen."""

import asyncio
import json
import math
import socket
import threading

import msgspec
import pytest
import torch
from transformers import LlamaForCausalLM

from babl.data.contexts import View
from babl.errors import UserError
from babl.evaluation.predictions import PromptLimits, predict
from babl.generation import GenerationConfig
from babl.generation.memory import SPARE
from babl.web.engine import models
from babl.web.engine import scheduler as scheduler_module
from babl.web.engine.prepare import prepare
from babl.web.engine.protocol import Delta, Done, Failed, Queued, Reading

LONG = "the small fox reads a long book about old rivers and the town where nobody asks who answers what. " * 9
FAMILIES = ("t5", "llama", "bloom")


@pytest.mark.parametrize("model", FAMILIES)
def test_answers_are_the_engines(hand, engines, loop, complete, model):
    drawn = {"temperature": 1.2, "top_k": 40, "seed": 7}
    made = hand(model)
    requests = [
        complete(model, "the small fox", max_new_tokens=12),
        complete(model, "nobody asks", max_new_tokens=20, **drawn),
        complete(model, "a long", max_new_tokens=9, repetition_penalty=1.4, stop=["old"]),
    ]
    configs = [
        GenerationConfig(max_new_tokens=12),
        GenerationConfig(max_new_tokens=20, **drawn),
        GenerationConfig(max_new_tokens=9, repetition_penalty=1.4, stop_strings=("old",)),
    ]
    ids = made.submit(*requests)
    loop.run(made.finish(*ids))
    for request, config in zip(requests, configs, strict=True):
        (expected,) = engines[model].answer([request.prompt], [config])
        done = made.last(request.id)
        assert (done.text, done.finish, done.tokens) == (expected.text, expected.finish, len(expected.ids))
        assert done.log_prob == pytest.approx(expected.log_prob, abs=1e-3)
        assert done.probability == pytest.approx(math.exp(done.log_prob))
        assert made.text(request.id) == done.text and done.seconds > 0
        text = ""
        for delta in [event for event in made.events[request.id] if isinstance(event, Delta)]:
            before, text = text, text + delta.text
            written = engines[model].tokenizer.decode(list(expected.ids[: delta.tokens]))
            assert written.startswith(text) and not before.startswith(written), "told with its last token"
        assert len(done.weights) == len(done.tokenizer) == 12


@pytest.mark.parametrize("model", FAMILIES)
def test_questions_are_answered_as_in_evaluation(hand, engines, loop, ask, model):
    contexts = [None, "the old town", LONG * 3, LONG]
    views = [View(f"q{i}", "who reads", context) for i, context in enumerate(contexts)]
    window = 512 if model != "llama" else 256 - 12
    asking = PromptLimits(window, min(128, window // 4), 12)
    expected = [predict(engines[model], [view], asking, progress=False)[0] for view in views]
    made = hand(model)
    ids = made.submit(*(ask(model, "who reads", context, max_new_tokens=12) for context in contexts))
    loop.run(made.finish(*ids))
    for id, prediction in zip(ids, expected, strict=True):
        done = made.last(id)
        (reading,) = [event for event in made.events[id] if isinstance(event, Reading)]
        assert (done.text, done.tokens, reading.windows) == (
            prediction.prediction,
            prediction.tokens,
            prediction.windows,
        )
        assert done.log_prob == pytest.approx(prediction.log_prob, abs=1e-3)
        assert made.text(id) == done.text
    assert expected[2].windows > 1


def test_the_probability_of_an_answer_is_that_of_the_line_shown(hand, shared, loop, ask, chat):
    """By transformers; a model that has not learned to end goes on to write other lines, which count for nothing."""
    model, question, context = "stories260K", "What did Tom see?", "Tom saw a big red ball in the park. " * 30
    reference = LlamaForCausalLM.from_pretrained(shared / "checkpoints" / model).eval()
    made = hand(model, folder=shared / "checkpoints")
    requests = [
        make(model, question, context=passage, max_new_tokens=64)
        for make in (ask, chat)
        for passage in (context[:36], context)
    ]
    loop.run(made.finish(*made.submit(*requests)))
    reader = made.scheduler._workers[model].loaded.reader
    for request in requests:
        done, found = made.last(request.id), []
        for prompt in prepare(request, reader).prompts:
            with torch.no_grad():
                ids = reference.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0].tolist()
                log_probs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
            written = ids[len(prompt) :]
            lines = [reader.tokenizer.decode(written[: n + 1]) for n in range(len(written))]
            end = next((n for n, text in enumerate(lines) if "\n" in text), len(written) - 1)
            total = sum(log_probs[len(prompt) - 1 + n, written[n]].item() for n in range(end + 1))
            found.append((total, lines[end].split("\n")[0].strip(), end + 1))
        expected = max(found)
        assert (done.text, done.tokens) == expected[1:] and done.log_prob == pytest.approx(expected[0], abs=1e-3)
        assert (len(found) > 1) == (request.context == context)


@pytest.mark.parametrize("model", FAMILIES)
def test_requests_that_come_at_any_time_are_each_answered_as_alone(hand, loop, complete, ask, chat, model):
    def requests():
        for i in range(10):
            prompt = LONG[i * 7 : i * 7 + 5 + (37 * i) % 90]
            yield complete(model, prompt, max_new_tokens=4 + i, temperature=float(i % 2), seed=i)
            yield ask(model, prompt, LONG[: 60 * i + 1], max_new_tokens=6)
            yield chat(model, prompt, max_new_tokens=7, repetition_penalty=1.0 + i / 20)

    made, ids = hand(model), []
    for i, request in enumerate(requests()):
        ids += made.submit(request)
        made.step(i % 4)
    loop.run(made.finish(*ids))
    alone = hand(model)
    for id, request in zip(ids, requests(), strict=True):
        alone.submit(request)
        loop.run(alone.finish(request.id))
        one, other = made.last(id), alone.last(request.id)
        assert (one.text, one.finish, one.tokens, one.span) == (other.text, other.finish, other.tokens, other.span)
    assert made.scheduler.steps < alone.scheduler.steps / 2, "together is fewer steps"


def test_chats_that_come_together_are_written_together(hand, loop, complete):
    made = hand("bloom")
    made.endless("bloom")
    ids = made.submit(*(complete("bloom", "the fox", max_new_tokens=40, seed=i, temperature=1.0) for i in range(8)))
    made.step(12)
    assert [len(task.rows[0].ids) for task in made.scheduler._running()] == [12] * 8
    (late,) = made.submit(complete("bloom", "a book", max_new_tokens=40))
    made.step(12)
    assert 20 <= len(made.scheduler._running()[0].rows[0].ids) <= 24, "who comes later does not stop them"
    loop.run(made.finish(*ids, late))
    assert made.scheduler.steps <= 12 + 40 + 2, "and is written with them"


def test_hundreds_of_windows_hold_nobody_up(hand, loop, ask, chat):
    made = hand("t5")
    many, brief = made.submit(ask("t5", "who?", LONG * 150, user="a"), chat("t5", "who?", user="b", max_new_tokens=3))
    loop.run(made.finish(brief))
    reading = len(made.scheduler._workers["t5"].reading)
    assert reading > 20 and made.scheduler.steps < 20
    made.scheduler.cancel(many)
    assert not made.scheduler._workers["t5"].reading


def test_answers_wait_until_there_is_memory_for_their_keys_and_values(hand, folder, complete, monkeypatch):
    made = hand("bloom")
    made.endless("bloom")
    tokens = len(made.scheduler._workers["bloom"].loaded.reader.tokenizer.encode("the fox")) + 100
    config = json.loads((folder / "bloom" / "config.json").read_text())
    a_row = 2 * config["n_layer"] * config["hidden_size"] * 4 * tokens  # keys and values in fp32
    monkeypatch.setattr(scheduler_module, "free_memory", lambda device: SPARE + 3 * a_row + a_row // 2)
    ids = made.submit(*(complete("bloom", "the fox", max_new_tokens=100, user=str(i)) for i in range(8)))
    seen = 0
    while not all(isinstance(made.last(id), Done) for id in ids):
        made.step(1)
        seen = max(seen, len(made.scheduler._running()))
    assert seen == 3 and all(made.last(id).tokens == 100 for id in ids)
    (large,) = made.submit(complete("bloom", "the fox", max_new_tokens=1000))
    made.step(1)
    needed = -(-a_row * (tokens + 900) // tokens >> 20)
    said = f"the answer needs {needed} MiB for its keys and values, but {3 * a_row + a_row // 2 >> 20} MiB are free"
    assert (made.last(large).code, said in made.last(large).message) == ("prompt", True), made.last(large)


def test_models_take_turns(hand, loop, complete):
    made = hand("bloom", "t5")
    made.endless("bloom")
    made.endless("t5")
    ids = made.submit(*(complete(model, "the fox", max_new_tokens=30) for model in ("bloom", "t5")))
    made.step(20)
    written = [len(task.rows[0].ids) for worker in made.scheduler._workers.values() for task in worker.tasks]
    assert written == [10, 10]
    loop.run(made.finish(*ids))


def test_a_span_is_code_points_of_the_context(hand, loop, ask, chat):
    made = hand("t5")
    engine = made.scheduler._workers["t5"].loaded.engine
    wanted = iter([*engine.tokenizer.encode("old rivers"), engine.tokenizer.eos_id] * 3)
    engine.hook = lambda logits: logits.index_fill(-1, torch.tensor([next(wanted)]), 1e9)
    for context, span in (
        ("🦊🏳️‍🌈 Zoë reads about old  rivers.", "old  rivers"),
        ("the fox", None),
    ):
        made.submit(request := ask("t5", "what?", context, seed=1, temperature=0.001))
        loop.run(made.finish(request.id))
        done = made.last(request.id)
        assert done.text == "old rivers"
        assert span == (None if done.span is None else context[slice(*done.span)])
    made.submit(request := chat("t5", "what?", system="🦊 old rivers", temperature=0.001))
    loop.run(made.finish(request.id))
    assert made.last(request.id).span == (2, 12)


def test_a_cancel_is_seen_at_the_next_step_in_every_state(hand, loop, folder, complete, monkeypatch):
    made = hand("bloom", max_running=2)
    made.endless("bloom")
    first, second, third = made.submit(*(complete("bloom", "the fox", user=u, max_new_tokens=500) for u in "abc"))
    made.step(5)
    steps, written = made.scheduler.steps, made.text(first)
    made.scheduler.cancel(first)  # while it is written
    assert made.last(first).finish == "cancelled" and made.last(first).text.startswith(written)
    assert made.last(first).tokens == 5
    made.scheduler.cancel(third)  # in the queue
    assert set(made.kinds(third)[:-1]) == {"Queued"} and made.last(third).finish == "cancelled"
    assert made.last(third).text == ""
    assert made.scheduler.steps == steps, "no step was needed"
    made.step()
    assert len(made.scheduler._workers["bloom"].writing[False].rows) == 1, "nor is one spent on it"
    made.scheduler.cancel(second)
    made.step(3)
    assert made.scheduler.steps == steps + 1 and not made.scheduler._running()
    assert not made.scheduler._workers["bloom"].writing, "what they had in memory is given back"

    made.scheduler._workers["bloom"].read_tokens = 64  # as on a slow machine
    (reading,) = made.submit(complete("bloom", LONG * 8, max_new_tokens=500))
    made.step(2)
    assert made.kinds(reading) == ["Queued", "Reading"] and not made.scheduler._workers["bloom"].reading[0].read
    made.scheduler.cancel(reading)
    assert made.last(reading).finish == "cancelled" and made.last(reading).tokens == 0
    steps = made.scheduler.steps
    made.step(3)
    assert made.scheduler.steps == steps

    gate, load = threading.Event(), models.load_model
    monkeypatch.setattr(models, "load_model", lambda *arguments: gate.wait(20) and load(*arguments))

    async def cancelled_while_loading():
        (loading,) = made.submit(complete("t5", "the fox"))
        made.step()
        await asyncio.sleep(0.01)
        assert made.kinds(loading) == ["Queued", "Loading"]
        made.scheduler.cancel(loading)
        assert made.last(loading).finish == "cancelled"
        gate.set()
        while "t5" not in made.scheduler._workers:
            await asyncio.sleep(0.01)
        made.step(2)
        assert made.kinds(loading) == ["Queued", "Loading", "Done"]

    loop.run(cancelled_while_loading())


def test_others_go_on_while_a_model_is_loaded(hand, loop, complete, monkeypatch):
    made, gate, load = hand("bloom"), threading.Event(), models.load_model
    monkeypatch.setattr(models, "load_model", lambda *arguments: gate.wait(20) and load(*arguments))

    async def together():
        waits, goes = made.submit(complete("t5", "the fox", max_new_tokens=3), complete("bloom", "a", max_new_tokens=3))
        await made.finish(goes)
        assert made.kinds(waits) == ["Queued", "Loading"]
        states = {state.name: state.state for state in await made.scheduler.models()}
        assert (states["t5"], states["bloom"], states["llama"]) == ("loading", "loaded", "unloaded")
        gate.set()
        await made.finish(waits)
        assert isinstance(made.last(waits), Done)

    loop.run(together())


def test_users_take_turns_and_none_has_all_the_places(hand, loop, complete):
    made = hand("bloom", max_running=4)
    greedy = made.submit(*(complete("bloom", "the fox", user="a", max_new_tokens=6) for _ in range(12)))
    made.step(2)
    assert len(made.scheduler._running()) == 2
    (modest,) = made.submit(complete("bloom", "a book", user="b", max_new_tokens=6))
    assert made.events[modest][0] == Queued(modest, 1), "one of each user in turn"
    loop.run(made.finish(*greedy, modest))
    ends = [event.id for event in made.order if isinstance(event, Done)]
    assert ends.index(modest) <= 2
    positions = [event.position for event in made.events[greedy[11]] if isinstance(event, Queued)]
    assert positions[0] == 11 and positions[-1] <= 1 and max(positions[2:]) <= 10


def test_a_full_queue_refuses_with_a_time_to_come_back(hand, loop, complete):
    made = hand("bloom", max_waiting=3, max_running=1)
    ids = made.submit(*(complete("bloom", "the fox", max_new_tokens=4) for _ in range(5)))
    for id in ids[3:]:
        failed = made.last(id)
        assert (failed.code, len(made.events[id])) == ("busy", 1) and failed.retry_after >= 1
        assert failed.message == "3 requests are waiting already; ask again later"
    loop.run(made.finish(*ids[:3]))
    (later,) = made.submit(complete("bloom", "the fox", max_new_tokens=4))
    loop.run(made.finish(later))
    assert isinstance(made.last(later), Done)


def test_a_request_that_is_sent_again_changes_nothing(hand, loop, complete):
    made, request = hand("bloom"), complete("bloom", "the fox", max_new_tokens=4)
    made.submit(request, request)
    made.step(2)
    made.submit(request)
    loop.run(made.finish(request.id))
    assert made.kinds(request.id).count("Done") == made.kinds(request.id).count("Reading") == 1


def test_what_cannot_be_answered_says_why(hand, loop, complete, monkeypatch):
    made = hand("llama", "bloom")
    requests = {
        "prompt": [complete("llama", LONG * 3), complete("bloom", "")],
        "model": [complete("lama", "x"), complete("odd", "x"), complete("empty", "x")],
    }
    ids = made.submit(*requests["prompt"], *requests["model"])
    loop.run(made.finish(*ids))
    assert [made.last(id).code for id in ids] == ["prompt", "prompt", "model", "model", "model"]
    messages = [made.last(id).message for id in ids]
    assert "this model reads at most 255" in messages[0] and "the prompt is empty" in messages[1]
    assert messages[2] == "no model 'lama'; did you mean 'llama'?"
    assert "model_type is 'gpt2'" in messages[3] and "no weights" in messages[4]
    monkeypatch.setattr("babl.generation.memory.free_memory", lambda device: 100 << 20)
    loop.run(made.scheduler.unload("bloom"))
    (id,) = made.submit(complete("bloom", "x"))
    loop.run(made.finish(id))
    assert made.last(id).code == "model"
    assert made.last(id).message == "bloom needs 257 MiB of memory, but 100 MiB are free; unload another model"


def test_a_request_that_breaks_its_preparation_fails_alone(hand, loop, chat, complete, capsys):
    made = hand("talks")
    for template in ("{{ messages[5:][0].content + 1 }}", "{{ messages | length + 'x' }}"):
        made.scheduler._workers["talks"].loaded.reader.tokenizer.chat_template = template
        (id,) = made.submit(chat("talks", "x"))
        made.step()
        assert made.last(id).code == "prompt" and "chat template failed" in made.last(id).message
    wrong = complete("talks", "x")
    msgspec.structs.force_setattr(wrong, "prompt", 5)  # as a fault of ours would
    (id,) = made.submit(wrong)
    made.step()
    assert made.last(id) == Failed(id, "prompt", "the prompt cannot be made (TypeError)")
    assert "TypeError" in capsys.readouterr().err


def test_a_model_that_breaks_down_fails_its_own_answers_alone(hand, loop, complete, capsys):
    made = hand("bloom", "t5")
    broken, other = made.submit(complete("bloom", "the fox"), complete("t5", "the fox", max_new_tokens=9))
    made.step(4)

    def fail(logits):
        raise RuntimeError("out of memory")

    engine = made.scheduler._workers["bloom"].loaded.engine
    engine.hook = fail
    loop.run(made.finish(broken, other))
    assert made.last(broken) == Failed(broken, "engine", "bloom crashed (RuntimeError)")
    assert isinstance(made.last(other), Done) and "out of memory" in capsys.readouterr().err
    engine.hook = None
    (again,) = made.submit(complete("bloom", "the fox", max_new_tokens=3))
    loop.run(made.finish(again))
    assert isinstance(made.last(again), Done)


def test_a_model_that_changes_while_it_is_read_is_not_loaded(make_model, tmp_path, monkeypatch):
    file = make_model("bloom", tmp_path / "one") / "model.safetensors"
    load = models.Engine.load

    def load_as_it_is_written(*arguments):
        engine = load(*arguments)
        file.write_bytes(file.read_bytes())
        return engine

    monkeypatch.setattr(models.Engine, "load", load_as_it_is_written)
    with pytest.raises(UserError, match=r"model\.safetensors was changed while one was read from it; load it again"):
        models.load_model("one", [tmp_path], "cpu", "float32")


def test_models_are_listed_with_their_states(hand, loop, folder):
    states = {state.name: state for state in loop.run(hand("t5").scheduler.models())}
    assert set(states) == {"t5", "llama", "bloom", "talks", "odd", "empty"}
    assert states["t5"].state == "loaded" and states["llama"].state == "unloaded"
    assert (states["llama"].family, states["llama"].context) == ("llama", 256)
    assert states["llama"].memory == 4 * states["llama"].parameters
    assert states["odd"].state == states["empty"].state == "unusable" and "gpt2" in states["odd"].reason


def test_what_demo_and_train_leave_is_found(folder, tmp_path):
    for name in ("demo/model-gold", "run/checkpoints/step_000004", "run/data", ".hidden/model-x", "run/.aside/model-y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    (tmp_path / "run/checkpoints/latest").symlink_to("step_000004")
    (tmp_path / "demo/model-none").symlink_to("../run/checkpoints/latest")
    assert list(models.find_models([tmp_path])) == ["demo/model-gold", "demo/model-none"]  # each is listed once
    (tmp_path / "demo/model-none").unlink()
    assert list(models.find_models([tmp_path])) == ["demo/model-gold", "run/checkpoints/latest"]
    assert models.find_models([folder, tmp_path])["t5"] == folder / "t5"
    assert models.find_models([tmp_path / "absent"]) == {}
    assert models.find_models([folder / "t5"]) == {"t5": folder / "t5"}


def test_unloading_is_refused_while_it_writes(hand, loop, complete):
    made = hand("bloom")
    made.endless("bloom")
    (id,) = made.submit(complete("bloom", "the fox", max_new_tokens=500))
    made.step(2)
    with pytest.raises(ValueError, match="bloom is writing 1 answers; stop them first"):
        loop.run(made.scheduler.unload("bloom"))
    made.scheduler.cancel(id)
    loop.run(made.scheduler.unload("bloom"))
    states = {state.name: state.state for state in loop.run(made.scheduler.models())}
    assert states["bloom"] == "unloaded"


def test_a_request_is_counted_without_its_weights(hand, loop, chat):
    made = hand()
    counted = loop.run(made.scheduler.count(chat("talks", "the fox", "reads", "who", max_new_tokens=8)))
    assert (counted.limit, counted.cut_tokens, counted.windows) == (248, 0, 1) and counted.prompt_tokens > 6
    with pytest.raises(ValueError, match="no model 'nobody'"):
        loop.run(made.scheduler.count(chat("nobody", "x")))
    assert {state.state for state in loop.run(made.scheduler.models())} == {"unloaded", "unusable"}


def test_nothing_is_computed_while_nobody_keeps_up_with_the_events(hand, complete, loop):
    made = hand("bloom")
    made.endless("bloom")

    async def run():
        room = asyncio.Event()
        work = asyncio.create_task(made.scheduler.run(room.wait))
        (id,) = made.submit(complete("bloom", "the fox", max_new_tokens=30))
        for _ in range(50):
            await asyncio.sleep(0)
        assert made.scheduler.steps == 1
        room.set()
        while not isinstance(made.last(id), Done):
            await asyncio.sleep(0)
        work.cancel()

    loop.run(run())


def test_the_loop_sees_a_cancel_before_the_next_step(hand, complete, loop):
    made = hand("bloom")
    made.endless("bloom")

    async def drained():
        pass

    async def cancelled_by_a_callback():
        work = asyncio.create_task(made.scheduler.run(drained))
        (id,) = made.submit(complete("bloom", "the fox", max_new_tokens=4000))
        while made.scheduler.steps < 20:
            await asyncio.sleep(0)
        read, write = await asyncio.open_connection(sock=ours)
        theirs.send(b"cancel")
        sent = made.scheduler.steps
        await read.read(6)
        made.scheduler.cancel(id)
        seen = made.scheduler.steps
        work.cancel()
        write.close()
        return seen - sent, made.last(id).tokens

    ours, theirs = socket.socketpair()
    late, tokens = loop.run(cancelled_by_a_callback())
    theirs.close()
    assert late <= 1 and tokens >= 20
