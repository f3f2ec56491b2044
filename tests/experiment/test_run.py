import hashlib
import json
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch

from babl.data.fictional import fictional_corpus
from babl.data.loader import BatchConfig, Loader
from babl.data.prepare import prepare_data
from babl.data.sets import DataConfig
from babl.data.squad import Answer, Example, parse_squad
from babl.evaluation.predictions import Prediction
from babl.experiment import run as run_module
from babl.experiment.plan import Cell, Plan
from babl.experiment.run import (
    EXPIRED_SECONDS,
    MARK,
    Busy,
    held,
    multiplying_weights,
    order_hash,
    training_flops,
    write_json,
)
from babl.models import save_pretrained
from babl.models.llama import Llama, LlamaConfig
from babl.models.t5 import T5, T5Config
from babl.text import train_tokenizer


@pytest.fixture
def sleeper(tmp_path):
    """A process that a cell's training has left behind."""
    environment = os.environ | {MARK: str(tmp_path.absolute())}
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment)
    yield process
    process.kill()
    process.wait()


def lock(folder, host, pid, created):
    write_json(folder / "lock", {"host": host, "pid": pid, "created": created})


def test_a_cell_is_one_process_s_alone(tmp_path):
    with held(tmp_path):
        with pytest.raises(Busy), held(tmp_path):
            pass
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()


def test_a_dead_holder_s_cell_is_taken_and_its_training_ended(tmp_path, sleeper):
    here = socket.gethostname()
    lock(tmp_path, here, sleeper.pid, psutil.Process(sleeper.pid).create_time())
    with pytest.raises(Busy), held(tmp_path):
        pass
    assert sleeper.poll() is None
    lock(tmp_path, here, os.getpid(), 1.0)  # a number of a process that ended long ago
    with held(tmp_path):
        assert not psutil.pid_exists(sleeper.pid)


def test_another_machine_s_cell_is_taken_once_its_heart_has_stopped(tmp_path):
    lock(tmp_path, "elsewhere", 1, 1.0)
    with pytest.raises(Busy), held(tmp_path):
        pass
    old = time.time() - EXPIRED_SECONDS - 1
    os.utime(tmp_path / "lock", (old, old))
    with held(tmp_path):
        pass


def test_the_order_is_what_the_loader_deals():
    examples, examples_per_step, steps = parse_squad(fictional_corpus(2, 1)[0], "fictional"), 8, 17
    words = [len(example.context.split()) for example in examples]
    loader = Loader([(1, 1)] * len(words), words, BatchConfig(examples=examples_per_step), 3, 0, 1)
    dealt = [examples[i].id for _ in range(steps) for i in loader.next_step()[0]]
    assert order_hash(examples, examples_per_step, 3, steps) == hashlib.sha256("\n".join(dealt).encode()).hexdigest()
    assert order_hash(examples, examples_per_step, 3, steps) != order_hash(examples, examples_per_step, 4, steps)


def test_the_order_is_that_of_training_where_words_are_not_between_spaces(tmp_path):
    """Text without spaces is one word to `split`, however long it is, and nothing would be sorted by length."""
    contexts = ["他于一八一零年出生于华沙附近的一个小村庄。" * (1 + 7 * i % 12) for i in range(32)]
    examples = [
        Example(f"z{i}", f"t{i}", "他在哪里出生?", text, (Answer("华沙", 10),)) for i, text in enumerate(contexts)
    ]
    tokenizer = train_tokenizer(contexts, 300, tmp_path)
    prepared = prepare_data(DataConfig(), (examples, examples[:1]), (tokenizer, 512, 64, "t5"), None, lambda line: None)
    loader = Loader([(1, 1)] * 32, prepared.words, BatchConfig(examples=4), 3, 0, 1)
    dealt = [prepared.train[i].id for _ in range(8) for i in loader.next_step()[0]]
    assert sorted(dealt) == sorted(e.id for e in examples)
    assert order_hash(examples, 4, 3, 8) == hashlib.sha256("\n".join(dealt).encode()).hexdigest()


@pytest.mark.parametrize(("version", "asks"), [("v2.0", True), ("1.1", False)])
def test_questions_are_scored_for_no_answer_by_the_version_of_their_file(tmp_path, monkeypatch, version, asks):
    """Also where no question in use is unanswerable: the file's rules are still those of 2.0."""
    qas = [{"id": "q", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}]}]
    data = {"version": version, "data": [{"title": "T", "paragraphs": [{"context": "Ann came.", "qas": qas}]}]}
    for folder in ("data", "cells/c/predictions"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data" / "test.json").write_text(json.dumps(data))
    tree = {"decoding": {}, "tests": ["gold"], "data": {"context_seed": 0}}
    asked = []

    def answers(path, engine, views, asking, key, progress):
        asked.append(asking)
        path.write_text("")
        return [Prediction("q", "Ann", -0.1, 1, True, 1)]

    monkeypatch.setattr(run_module, "predict_into", answers)
    monkeypatch.setattr(run_module, "answer_key", lambda *of: "key")
    monkeypatch.setattr(run_module.Engine, "load", lambda model: None)
    run_module._score(Plan(tmp_path, tree), Cell("c", "m", "gold", 0), lambda: False)
    assert [asking.no_answer for asking in asked] == [asks]
    assert json.loads((tmp_path / "cells/c/scored.json").read_text())["gold"]["exact"] == 100


def test_weights_that_multiply_are_counted_once(tmp_path):
    torch.manual_seed(0)
    t5 = T5(T5Config(d_model=8, d_kv=4, d_ff=16, num_heads=2, num_layers=1, num_decoder_layers=1, vocab_size=50))
    save_pretrained(t5, tmp_path / "t5")
    attention, feed_forward, norms = 4 * 8 * 8, 2 * 8 * 16, 8
    encoder = attention + feed_forward + 3 * norms
    decoder = 2 * attention + feed_forward + 4 * norms + 50 * 8  # its head is the table of embeddings
    assert multiplying_weights(tmp_path / "t5") == (encoder, decoder)
    assert training_flops((encoder, decoder), 100, 10) == 6 * (90 * encoder + 10 * decoder)

    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for tied in (False, True):
        save_pretrained(Llama(LlamaConfig(vocab_size=50, tie_word_embeddings=tied, **shape)), tmp_path / f"{tied}")
        assert multiplying_weights(tmp_path / f"{tied}") == (0, 4 * 64 + 3 * 8 * 16 + 3 * 8 + 50 * 8)
    assert training_flops((0, 7), 100, 10) == 6 * 7 * 100
