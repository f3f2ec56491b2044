"""`babl pull` against a hub served on loopback."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pexpect
import pytest

from babl.models import from_pretrained, save_pretrained
from babl.models.build import ModelConfig, build_model
from babl.text import train_tokenizer

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Serves repositories as huggingface.co does: the api's description, then each file with ranges."""

    def __init__(self, repos):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = repos  # name -> {file: bytes}, or a status and an error code
        self.cut = set()  # files whose first transfer breaks off in the middle
        self.requests = []  # (method, path, range)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, wanted))
        api = re.match(r"/api/models/([^/]+/[^/]+)/revision/([^?]+)", self.path)
        if api:
            return self.describe(*api.groups())
        repo, _, name = re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path).groups()
        content = self.server.repos[repo][name]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": SHA, "Accept_Ranges": "bytes"}
        if not wanted:
            if name in self.server.cut and self.command == "GET":
                self.server.cut.discard(name)
                self.send_response(200)
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return None
            return self.answer(200, content, **headers)
        start = int(re.match(r"bytes=(\d+)-", wanted)[1])
        headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.answer(206, content[start:], **headers)

    def describe(self, repo, revision):
        files = self.server.repos.get(repo)
        if files is None:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        if isinstance(files, str):
            return self.answer(403, b"{}", X_Error_Code=files)
        if revision not in ("main", SHA):
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        siblings = [
            {"rfilename": name, "size": self.server.announced.get(name, len(content)), "blobId": "x"}
            for name, content in files.items()
        ]
        body = {"id": repo, "modelId": repo, "sha": SHA, "private": False, "tags": [], "downloads": 0, "likes": 0}
        return self.answer(200, json.dumps(body | {"siblings": siblings}).encode(), Content_Type="application/json")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The files of a model of 29 MB: the library goes on from the last 10 MiB that arrived."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(["who did it, and where"], 300, folder)
    shape = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 4}
    save_pretrained(build_model(ModelConfig(family="llama", shape=shape), folder, 0)[0], folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(model):
    extra = {"README.md": b"#", "pytorch_model.bin": b"pickle", "onnx/model.safetensors": b"x"}
    hub = Hub({
        "me/tiny": model | extra,
        "me/pickled": {"config.json": model["config.json"], "pytorch_model.bin": b"pickle"},
        "me/bare": {"config.json": model["config.json"]},
        "me/other": model | {"config.json": b'{"model_type": "gpt2"}'},
        "me/gated": "GatedRepo",
    })  # fmt: skip
    hub.announced = {}
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()


def pull(hub, tmp_path, *arguments, **environment):
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"} | environment
    command = [sys.executable, "-m", "babl.cli", "pull", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)


def test_what_is_pulled_is_a_model_folder_and_nothing_else(hub, model, tmp_path):
    result = pull(hub, tmp_path, "me/tiny")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "models/tiny"
    folder = tmp_path / "models" / "tiny"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == model
    from_pretrained(folder)
    again = pull(hub, tmp_path, "me/tiny")
    assert again.returncode == 2 and "models/tiny is there already" in again.stderr


def test_a_terminal_shows_progress(hub, tmp_path):
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(tmp_path / "hf")}
    shown = pexpect.run(f"{sys.executable} -m babl.cli pull me/tiny", cwd=tmp_path, env=env, encoding="utf-8")
    assert re.search(r"model.safetensors: +100%", shown)


def test_a_cut_connection_goes_on_in_the_middle_of_the_file(hub, model, tmp_path):
    hub.cut.add("model.safetensors")
    result = pull(hub, tmp_path, "me/tiny", "--to", "m")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == model["model.safetensors"]
    half = len(model["model.safetensors"]) // 2
    ranges = [wanted for method, path, wanted in hub.requests if method == "GET" and "model.safetensors" in path]
    assert len(ranges) == 2 and 0 < int(re.match(r"bytes=(\d+)-", ranges[1])[1]) <= half


def test_a_killed_pull_goes_on_where_it_was(hub, model, tmp_path):
    aside = tmp_path / ".m.part" / ".cache" / "huggingface" / "download"
    result = pull(hub, tmp_path, "me/tiny", "--to", "m")
    (tmp_path / "m").rename(tmp_path / ".m.part")  # as if killed before the last file came
    (tmp_path / ".m.part" / "model.safetensors").unlink()
    aside.mkdir(parents=True)
    hub.requests.clear()
    result = pull(hub, tmp_path, "me/tiny", "--to", "m")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == model["model.safetensors"]
    assert not (tmp_path / ".m.part").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["me/absent"], "me/absent: no such repository, or a private one (then set HF_TOKEN)"),
        (["me/gated"], "me/gated is gated: accept its terms at https://huggingface.co/me/gated, then set HF_TOKEN"),
        (["me/tiny", "--revision", "v9"], "--revision: me/tiny has no branch, tag or commit 'v9'"),
        (["me/pickled"], "me/pickled has no safetensors, only pytorch_model.bin, a pickle, which can run code"),
        (["me/bare"], "me/bare has no weights"),
        (["me/other"], "me/other: config.json: model_type is 'gpt2', expected one of t5, mt5, umt5, llama, bloom"),
        (["not a name"], "not a name"),
    ],
)
def test_what_cannot_be_pulled_is_answered_with_what_to_do(hub, tmp_path, arguments, message):
    result = pull(hub, tmp_path, *arguments, "--to", "m")
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "m").exists()
    assert not any(".safetensors" in path for method, path, _ in hub.requests if method == "GET")


def test_too_small_a_disk_is_known_beforehand(hub, tmp_path):
    hub.announced["model.safetensors"] = 1 << 60
    result = pull(hub, tmp_path, "me/tiny", "--to", "m")
    assert result.returncode == 2 and "MiB free, but 1,099,511," in result.stderr
    assert not any("resolve" in path for _, path, _ in hub.requests)


def test_a_file_of_another_size_than_announced_is_not_kept(hub, tmp_path):
    hub.announced["model.safetensors"] = 10
    result = pull(hub, tmp_path, "me/tiny", "--to", "m")
    assert result.returncode == 2 and "model.safetensors arrived with another size" in result.stderr
    assert not (tmp_path / "m").exists()


def test_without_a_network_it_says_what_to_do(hub, tmp_path):
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        result = pull(hub, tmp_path, "me/tiny", "--to", "m", **environment)
        assert result.returncode == 2 and "the hub did not give me/tiny" in result.stderr
        assert "or copy a downloaded folder to m" in result.stderr and "Traceback" not in result.stderr
