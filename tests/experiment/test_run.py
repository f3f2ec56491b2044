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
from babl.data.squad import parse_squad
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
    examples, a_step, steps = parse_squad(fictional_corpus(2, 1)[0], "fictional"), 8, 17
    words = [len(example.context.split()) for example in examples]
    loader = Loader([(1, 1)] * len(words), words, BatchConfig(examples=a_step), 3, 0, 1)
    dealt = [examples[i].id for _ in range(steps) for i in loader.next_step()[0]]
    assert order_hash(examples, a_step, 3, steps) == hashlib.sha256("\n".join(dealt).encode()).hexdigest()
    assert order_hash(examples, a_step, 3, steps) != order_hash(examples, a_step, 4, steps)


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
