"""`babl pull` against a hub served on loopback."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from types import SimpleNamespace

import huggingface_hub.constants
import pexpect
import pytest
import torch
from safetensors.torch import load_file

from babl.cli import main
from babl.models import from_pretrained, save_pretrained
from babl.models.build import ModelConfig, build_model
from babl.text import train_tokenizer

REFUSED_BYTES = 100_000  # most that a refusal may transfer


class Hub(http.server.ThreadingHTTPServer):
    """Serves repositories as huggingface.co does: the api's descriptions, then each file with ranges."""

    def __init__(self, repos):
        super().__init__(("127.0.0.1", 0), Handler)
        # Name -> {file: bytes} of main, or an error code; "name@refs/pr/N" of a pull request.
        self.repos = repos
        self.gated = set()  # repositories that are described, but give no file
        self.announced = {}  # file -> another size than it has
        self.mirror = False  # whether it is a mirror, without pull requests
        self.cut = set()  # files whose first transfer breaks off in the middle
        self.requests = []  # (method, path, range)
        self.sent = 0  # bytes, headers included

    @property
    def fetched(self):
        """Names of the files whose content was asked for."""
        return [path.split("/")[-1] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]

    def refs(self, repo):
        """Revision -> (commit, files)."""
        named = {name.partition("@")[2] or "main": name for name in self.repos if name.partition("@")[0] == repo}
        return {ref: (hashlib.sha1(name.encode()).hexdigest(), self.repos[name]) for ref, name in named.items()}

    def find(self, repo, revision):
        """The commit and the files of a branch, a pull request or a commit; no files where there is none."""
        return next((each for ref, each in self.refs(repo).items() if revision in (ref, each[0])), ("", None))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        write = self.wfile.write

        def counted(data):
            self.server.sent += len(data)
            return write(data)

        self.wfile.write = counted

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.do_GET()

    def do_GET(self):
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        wanted, path = self.headers.get("Range"), urllib.parse.urlsplit(self.path).path
        self.server.requests.append((self.command, path, wanted))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|paths-info|refs)(?:/([^/]+))?", path)
        repo = api[1] if api else "/".join(path.split("/")[1:3])
        found = self.server.repos.get(repo, "RepoNotFound")
        if isinstance(found, str):
            return self.answer(404 if found == "RepoNotFound" else 403, b"{}", X_Error_Code=found)
        if api:
            return self.describe(repo, api[2], urllib.parse.unquote(api[3] or ""), form)
        if repo in self.server.gated:
            return self.answer(403, b"", X_Error_Code="GatedRepo")
        _, revision, name = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path).groups()
        return self.give(name, *self.server.find(repo, revision), wanted)

    def give(self, name, commit, files, wanted):
        content = files[name]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": commit}
        headers["Accept_Ranges"] = "bytes"
        if not wanted:
            if name in self.server.cut and self.command == "GET":
                self.server.cut.discard(name)
                self.send_response(200)
                for key, value in (headers | {"Content_Length": str(len(content))}).items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return None
            return self.answer(200, content, **headers)
        start = int(re.match(r"bytes=(\d+)-", wanted)[1])
        headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.answer(206, content[start:], **headers)

    def describe(self, repo, kind, revision, form):
        if kind == "refs" and self.server.mirror:
            return self.answer(404, b"not found")
        if kind == "refs":
            every = [
                {"name": name, "ref": f"refs/heads/{name}" if name == "main" else name, "targetCommit": "x"}
                for name in self.server.refs(repo)
            ]
            requests = [ref for ref in every if ref["ref"].startswith("refs/pr/")]
            branches = [ref for ref in every if ref not in requests]
            return self.tell({"branches": branches, "converts": [], "tags": [], "pullRequests": requests})
        commit, files = self.server.find(repo, revision)
        if files is None:
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        if kind == "paths-info":
            here = [name for name in form["paths"] if name in files]
            return self.tell([{"type": "file", "path": n, "size": len(files[n]), "oid": "x"} for n in here])
        siblings = [
            {"rfilename": name, "size": self.server.announced.get(name, len(content)), "blobId": "x"}
            for name, content in files.items()
        ]
        body = {"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0}
        return self.tell(body | {"siblings": siblings})

    def tell(self, body):
        return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The files of a model of 29 MB: the library goes on from the last 10 MiB that arrived."""
    shape = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 4}
    return files_of("llama", shape, tmp_path_factory.mktemp("model"))


def files_of(family, shape, folder):
    train_tokenizer(["who did it, and where"], 300, folder)
    save_pretrained(build_model(ModelConfig(family=family, shape=shape), folder, 0)[0], folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Repositories of one small model in the layouts in which models are published."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("small")
    single = files_of("llama", shape, folder)
    save_pretrained(from_pretrained(folder), folder, shard_bytes=150_000)
    shards = {path.name: path.read_bytes() for path in folder.iterdir()}
    config, text = json.loads(single["config.json"]), shards["model.safetensors.index.json"]
    plain = {name: content for name, content in single.items() if name != "model.safetensors"}
    big = b"x" * 3_000_000  # weights that must not travel before a refusal
    pickled = plain | {"pytorch_model.bin": big}

    def renamed(old, new):
        index = text.replace(old.encode(), new.encode())
        files = {name.replace(old, new): content for name, content in shards.items()}
        return files | {"model.safetensors.index.json": index}

    def of(files, **changes):
        return files | {"config.json": json.dumps(config | changes).encode()}

    heavy = plain | {"model.safetensors": big}
    names = sorted(json.loads(text)["weight_map"])
    two = {name: f"pytorch_model-{1 + (name > 'model.layers.1')}.bin" for name in names}
    index = json.dumps({"weight_map": two}).encode()
    halves = {"pytorch_model-1.bin": big, "pytorch_model-2.bin": big, "pytorch_model.bin.index.json": index}
    lacking = {name: content for name, content in shards.items() if not name.startswith("model-00002")}
    return {
        "me/shards": shards,
        "me/underscore": renamed("model-", "model_"),
        "me/stem": renamed("model-", "weights.part-") | {"model-00001-of-00009.safetensors": big},
        "me/both": shards | single,
        "me/requested": pickled,
        "me/requested@refs/pr/2": plain | {"model.safetensors": b"an older one"},
        "me/requested@refs/pr/10": single,
        "me/requested@refs/pr/11": plain | {"README.md": b"#"},
        "me/requested-other": pickled,
        "me/requested-other@refs/pr/4": heavy | {"config.json": b'{"model_type": "gpt2"}'},
        "me/pickled": pickled,
        "me/pickled@refs/pr/1": pickled | {"README.md": b"#"},
        "me/pickled-shards": plain | halves,
        "me/pickled-lacking": plain | {name: halves[name] for name in halves if "-2" not in name},
        "me/lacking": lacking,
        "me/outside": renamed('"model-', '"../model-'),
        "me/no-index": plain | {"model.safetensors.index.json": b"[]"},
        "me/bare-model": renamed('"model.', '"'),  # the names of transformers' LlamaModel
        "me/lacking-tensor": renamed('"model.norm.weight"', '"model.layers.1.self_attn.q_proj.weight"'),
        "me/packed": renamed(".0.mlp.up_proj.weight", ".0.mlp.up_proj.qweight"),
        "me/more": renamed(
            '"model.norm.weight"', '"model.layers.0.mlp.up_proj.bias": "x.safetensors", "model.norm.weight"'
        )
        | {"x.safetensors": big},
        "me/deep": shards | {"config.json": json.dumps(config | {"num_hidden_layers": 10**9}).encode()},
        "me/bare": plain,
        "me/adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": big},
        "me/gguf": {"model-q4.gguf": big},
        "me/other": heavy | {"config.json": b'{"model_type": "gpt2"}'},
        "me/list": heavy | {"config.json": b"[]"},
        "me/gptq": of(heavy, quantization_config={"quant_method": "gptq", "bits": 4}),
        "me/yarn": of(heavy, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        "me/gelu": of(heavy, hidden_act="gelu"),
        "me/texts": of(heavy, num_hidden_layers="2"),
        "me/hidden": "GatedRepo",
        "me/gated": heavy,
    }


@pytest.fixture
def hub(model, layouts):
    extra = {"README.md": b"#", "pytorch_model.bin": b"pickle", "onnx/model.safetensors": b"x"}
    hub = Hub({"me/tiny": model | extra} | layouts)
    hub.gated = {"me/gated"}
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def pull(hub, tmp_path, monkeypatch, capsys):
    """Calls the verb in this process."""
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_address[1]}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = main(["pull", *map(str, arguments)])
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return call


def process(hub, tmp_path, *arguments, **environment):
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"} | environment
    command = [sys.executable, "-m", "babl.cli", "pull", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)


def test_what_is_pulled_is_a_model_folder_and_nothing_else(hub, pull, model, tmp_path):
    result = process(hub, tmp_path, "me/tiny")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "models/tiny"
    folder = tmp_path / "models" / "tiny"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == model
    from_pretrained(folder)
    again = pull("me/tiny")
    assert again.returncode == 2 and "models/tiny is there already" in again.stderr


def test_a_terminal_shows_progress(hub, tmp_path):
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(tmp_path / "hf")}
    command = f"{sys.executable} -m babl.cli pull me/tiny"
    shown = pexpect.run(command, cwd=tmp_path, env=env, encoding="utf-8", timeout=240)
    assert re.search(r"model.safetensors: +100%", shown)


def test_a_cut_connection_goes_on_in_the_middle_of_the_file(hub, pull, model, tmp_path):
    hub.cut.add("model.safetensors")
    result = pull("me/tiny", "--to", "m")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == model["model.safetensors"]
    half = len(model["model.safetensors"]) // 2
    ranges = [wanted for method, path, wanted in hub.requests if method == "GET" and "model.safetensors" in path]
    assert len(ranges) == 2 and 0 < int(re.match(r"bytes=(\d+)-", ranges[1])[1]) <= half


def test_a_killed_pull_goes_on_where_it_was_and_keeps_nothing_else(hub, pull, model, tmp_path):
    aside = tmp_path / ".m.part"
    pull("me/tiny", "--to", "m")
    (tmp_path / "m").rename(aside)  # as if killed before the last file came
    (aside / "model.safetensors").unlink()
    (aside / "model.safetensors.index.json").write_text("of another commit")
    (aside / ".cache" / "huggingface" / "download").mkdir(parents=True)
    result = pull("me/tiny", "--to", "m")
    assert result.returncode == 0, result.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == model
    assert not aside.exists()


@pytest.mark.parametrize("name", ["shards", "underscore", "stem", "both"])
def test_weights_are_those_that_the_index_names_or_the_single_file(hub, pull, layouts, tmp_path, name):
    result = pull(f"me/{name}", "--to", "m")
    assert result.returncode == 0, result.stderr
    files = layouts[f"me/{name}"]
    taken = {path.name for path in (tmp_path / "m").iterdir()}
    if name == "both":
        assert {each for each in taken if "safetensors" in each} == {"model.safetensors"}
    else:
        named = set(json.loads(files["model.safetensors.index.json"])["weight_map"].values())
        assert len(named) > 1
        assert {each for each in taken if "safetensors" in each} == named | {"model.safetensors.index.json"}
    (tmp_path / "single.safetensors").write_bytes(layouts["me/requested@refs/pr/10"]["model.safetensors"])
    published = load_file(tmp_path / "single.safetensors")
    state = from_pretrained(tmp_path / "m").state_dict()
    assert torch.equal(state["embed.weight"], published["model.embed_tokens.weight"])


def test_an_index_of_the_bare_model_is_that_of_the_model(pull, layouts, tmp_path):
    assert b'"embed_tokens.weight"' in layouts["me/bare-model"]["model.safetensors.index.json"]
    assert pull("me/bare-model", "--to", "m").returncode == 0


def test_the_newest_pull_request_with_safetensors_is_taken_and_named(hub, pull, layouts, tmp_path):
    result = pull("me/requested", "--to", "m")
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines() == [
        "babl pull: main has no safetensors: taking refs/pr/10, a pull request that nobody has merged; --pickles takes "
        "the pickles of main, for `babl convert`"
    ]
    files = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    assert files == layouts["me/requested@refs/pr/10"]
    assert not any(name.endswith(".bin") for name in hub.fetched)


def test_a_mirror_without_pull_requests_has_pickles_alone(hub, pull):
    hub.mirror = True
    result = pull("me/requested", "--to", "m")
    assert result.returncode == 2 and "me/requested has no safetensors, only pytorch_model.bin" in result.stderr


def test_pickles_are_fetched_on_request_alone(hub, pull, layouts, tmp_path):
    for name, weights in (("requested", 1), ("pickled-shards", 3)):
        result = pull(f"me/{name}", "--to", name, "--pickles")
        assert result.returncode == 0, result.stderr
        assert result.stderr == (
            f"babl pull: {name} holds pickles, which Babl does not load; `babl convert {name}` writes them as "
            "safetensors\n"
        )
        taken = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert taken == layouts[f"me/{name}"] and sum(".bin" in each for each in taken) == weights
    assert pull("me/both", "--to", "both", "--pickles").stderr == ""  # safetensors come first


REFUSED = {
    "absent": "me/absent: no such repository, or a private one (then set HF_TOKEN)",
    "hidden": "me/hidden is gated: accept its terms at https://huggingface.co/me/hidden, then set HF_TOKEN",
    "gated": "me/gated is gated: accept its terms at https://huggingface.co/me/gated, then set HF_TOKEN",
    "pickled": "me/pickled has no safetensors, only pytorch_model.bin, a pickle, which can run code when read; "
    "`babl pull me/pickled --pickles` fetches it, and `babl convert` then reads it without running any",
    "pickled-shards": "only pytorch_model-2.bin, a pickle",
    "pickled-lacking": "pytorch_model-2.bin, which pytorch_model.bin.index.json names, is not there",
    "lacking": "me/lacking: model-00002-of-00003.safetensors, which model.safetensors.index.json names, is not there",
    "outside": "names '../model-00001-of-00003.safetensors', expected a .safetensors file beside it",
    "no-index": "me/no-index: model.safetensors.index.json: not an index of shards",
    "lacking-tensor": "index.json names no model.norm.weight, and so is not that of the model in config.json",
    "packed": "me/packed: model.safetensors.index.json names no model.layers.0.mlp.up_proj.weight",
    "more": "me/more: model.safetensors.index.json names model.layers.0.mlp.up_proj.bias, and so is not that of",
    "deep": "me/deep: config.json says 1,000,000,000 layers, but model.safetensors.index.json names 21 tensors",
    "bare": "me/bare has no weights on main (expected model.safetensors or model.safetensors.index.json)",
    "adapter": "me/adapter has no config.json: an adapter, which needs the model it was made for",
    "gguf": "me/gguf has no config.json: no model of transformers",
    "other": "me/other: config.json: model_type is 'gpt2', expected one of t5, mt5, umt5, llama, bloom",
    "requested-other": "me/requested-other at refs/pr/4: config.json: model_type is 'gpt2'",
    "list": "me/list: config.json: expected an object, found list",
    "gptq": "me/gptq: config.json: the weights are quantised (quantization_config says 'gptq')",
    "yarn": "me/yarn: config.json: rope_type is 'yarn', expected one of 'default', 'linear', 'dynamic', 'llama3'",
    "gelu": "me/gelu: config.json: hidden_act is 'gelu', expected 'silu'",
    "texts": "me/texts: config.json: num_hidden_layers is '2'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_loaded_is_refused_before_its_weights_travel(hub, pull, tmp_path, name):
    result = pull(f"me/{name}", "--to", "m")
    assert result.returncode == 2
    assert REFUSED[name] in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert not [file for file in hub.fetched if file.endswith((".safetensors", ".bin", ".gguf"))]
    assert hub.sent <= REFUSED_BYTES


def test_a_name_or_a_revision_that_is_none_is_said(hub, pull, tmp_path):
    result = pull("me/tiny", "--revision", "v9", "--to", "m")
    assert result.returncode == 2 and "--revision: me/tiny has no branch, tag or commit 'v9'" in result.stderr
    result = pull("not a name", "--to", "m")
    assert result.returncode == 2 and "not a name" in result.stderr
    result = pull("me/requested", "--revision", "refs/pr/11", "--to", "m")  # what is asked for is not replaced
    assert result.returncode == 2 and "me/requested has no weights on refs/pr/11" in result.stderr
    assert not (tmp_path / "m").exists()


def test_too_small_a_disk_is_known_beforehand(hub, pull):
    hub.announced["model.safetensors"] = 1 << 60
    result = pull("me/tiny", "--to", "m")
    assert result.returncode == 2 and "MiB free, but 1,099,511," in result.stderr
    assert "model.safetensors" not in hub.fetched and hub.sent <= REFUSED_BYTES


def test_a_file_of_another_size_than_announced_is_not_kept(hub, pull, tmp_path):
    hub.announced["model.safetensors"] = 10
    result = pull("me/tiny", "--to", "m")
    assert result.returncode == 2 and "model.safetensors arrived with another size" in result.stderr
    assert not (tmp_path / "m").exists()


def test_without_a_network_it_says_what_to_do(hub, pull, tmp_path, monkeypatch):
    offline = process(hub, tmp_path, "me/tiny", "--to", "m", HF_HUB_OFFLINE="1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for result in (offline, pull("me/tiny", "--to", "m")):
        assert result.returncode == 2 and "the hub did not give me/tiny" in result.stderr
        assert "or copy a downloaded folder to m" in result.stderr and "Traceback" not in result.stderr
