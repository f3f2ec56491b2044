"""What a model takes, beside what transformers' caches, loaded engines and published figures say."""

import pytest
import torch
import transformers

from babl.errors import UserError
from babl.generation import Engine
from babl.generation.memory import SPARE, Need, left_of_limits, need, placement
from babl.generation.packed import PackedLinear
from babl.models import save_pretrained
from babl.models.build import ModelConfig, build_model
from babl.models.llama import LlamaConfig
from babl.models.weights import describe
from babl.text import train_tokenizer
from babl.web.engine.models import model_state

SHAPES = {
    "t5": {"d_model": 16, "d_kv": 6, "d_ff": 16, "num_heads": 3, "num_layers": 1, "num_decoder_layers": 2},
    "llama": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "max_position_embeddings": 300, "tie_word_embeddings": True},
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 6},
}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    train_tokenizer(["who did it"], 280, folder)
    save_pretrained(build_model(ModelConfig(family=request.param, shape=SHAPES[request.param]), folder, 0)[0], folder)
    return folder


def test_a_conversation_takes_what_the_caches_of_transformers_take(folder):
    ids = torch.arange(2, 42)[None]
    seq2seq = describe(folder)["family"] == "t5"
    model = (transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM).from_pretrained(
        folder
    )
    given = {"decoder_input_ids": ids[:, :24]} if seq2seq else {}
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True, **given).past_key_values
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if seq2seq else [cache]
    held = sum(layer.keys.nbytes + layer.values.nbytes for part in parts for layer in part.layers)
    tokens = 40 + 24 if seq2seq else 40
    assert need(describe(folder), "cpu", "float32", tokens).cache == held
    assert need(describe(folder), "cpu", "bfloat16", tokens).cache == held // 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_take_what_a_loaded_engine_holds(folder, dtype):
    engine = Engine.load(folder, "cpu", dtype)
    held = {id(p): p.nbytes for p in engine.model.parameters()}
    packed = [module.weight for module in engine.model.modules() if isinstance(module, PackedLinear)]
    assert bool(packed) == (dtype == "float32" and torch.backends.mkldnn.is_available())
    biases = sum(m.bias.nbytes for m in engine.model.modules() if isinstance(m, PackedLinear) and m.bias is not None)
    total = sum(held.values()) + sum(4 * weight.numel() for weight in packed) + biases
    assert need(describe(folder), "cpu", dtype).weights == total


@pytest.mark.parametrize(
    ("config", "bytes_a_token"),
    [
        (LlamaConfig(), 512 << 10),  # Llama-2-7B: half a MiB a token in 16 bits
        (LlamaConfig(num_key_value_heads=8), 128 << 10),  # Llama-3.1-8B
    ],
)
def test_published_models_take_what_is_said_of_them(config, bytes_a_token):
    layers, heads, width = config.cache_shape
    assert 2 * layers * heads * width * 2 == bytes_a_token


def test_the_context_asked_for_counts_and_the_models_own_bounds_it(folder):
    known = describe(folder)
    own = {"llama": 300}.get(known["family"])
    assert need(known, "cpu", "auto").context == (own or 2048)
    assert need(known, "cpu", "auto", 100).context == 100
    assert need(known, "cpu", "auto", 5000).context == (own or 5000)
    with pytest.raises(UserError, match="--context is 0, expected at least 1"):
        need(known, "cpu", "auto", 0)


def test_room_is_what_memory_is_left_for():
    free = SPARE + 1000 + 500
    assert Need("cpu", torch.float32, 1000, 2000, 100, free).room == 25
    assert not Need("cpu", torch.float32, 1000, 2000, 100, free).fits
    assert Need("cpu", torch.float32, 1000, 500, 100, free).fits
    assert Need("cpu", torch.float32, 1000, 500, 100, free - 1).room == 99
    assert Need("cpu", torch.float32, 1000, 10, 100, free).room == 100
    assert Need("cpu", torch.float32, 9000, 2000, 100, free).room == 0


@pytest.mark.parametrize(("halves", "dtype", "size"), [(True, torch.bfloat16, 2), (False, torch.float32, 4)])
def test_a_gpu_is_asked_what_is_free_and_whether_it_has_bfloat16(folder, monkeypatch, halves, dtype, size):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: halves)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 << 30, 8 << 30))
    assert placement("auto", "auto") == ("cuda", dtype)
    known = describe(folder)
    needed = need(known, "auto", "auto")
    assert (needed.weights, needed.free) == (size * known["parameters"], 5 << 30)
    state = model_state("m", folder, "auto", "auto")
    assert (state.memory, state.free) == (needed.weights, needed.free)


def group(root, path, **files):
    (root / path).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / path / name.replace("memory_", "memory.")).write_text(text)


def test_the_limits_of_a_job_count_and_what_files_cache_is_left(tmp_path):
    stat = "anon 100\nfile 70\ninactive_file 30\nactive_file 20\ntotal_inactive_file 5\ntotal_active_file 6\n"
    for name in ("two", "one"):
        (tmp_path / name / "proc/self").mkdir(parents=True)
    two, one = tmp_path / "two", tmp_path / "one"
    (two / "proc/self/cgroup").write_text("0::/slurm/job_7/step_0\n")
    group(two, "sys/fs/cgroup/slurm", memory_max="max\n", memory_current="9000\n", memory_stat=stat)
    group(two, "sys/fs/cgroup/slurm/job_7", memory_max="1000\n", memory_current="600\n", memory_stat=stat)
    group(two, "sys/fs/cgroup/slurm/job_7/step_0", memory_max="800\n", memory_current="500\n", memory_stat=stat)
    assert sorted(left_of_limits(two)) == [350, 450]
    (one / "proc/self/cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/not/seen/inside\n0::/\n")
    limits = {"memory_limit_in_bytes": "1000\n", "memory_usage_in_bytes": "600\n", "memory_stat": stat}
    group(one, "sys/fs/cgroup/memory", **limits)
    assert left_of_limits(one) == [411]
    assert left_of_limits(tmp_path) == []


def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(UserError, match=r"--device is 'mps', but torch finds .*cpu alone"):
        placement("mps", "auto")
