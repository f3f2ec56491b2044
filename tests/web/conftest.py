"""A real server in a process of its own, and people who use it, on SQLite and on PostgreSQL."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from babl.models.build import ModelConfig, build_model
from babl.models.weights import save_pretrained
from babl.text import train_tokenizer

WORDS = "the small fox reads a long book about old rivers and the town where nobody asks who answers what"
SHAPES = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
    "llama": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256,
    },
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 6},
}  # fmt: skip
LINK = re.compile(r"Babl is at (http://\S+)")


class Person:
    """A browser's view of a server: cookies, the token of its pages, and what it can do."""

    def __init__(self, address: str):
        self.http = httpx.Client(base_url=address, timeout=30)

    def enter(self, path: str, **form: str) -> "Person":
        """Is logged in, by a link or by a form."""
        if form:
            form["csrfmiddlewaretoken"] = self._token(self.http.get(path))
            response = self.http.post(path, data=form)
        else:
            response = self.http.get(path)
        assert response.status_code == 302, response.text
        self.http.headers["X-CSRFToken"] = self._token(self.http.get("/"))
        return self

    @staticmethod
    def _token(response: httpx.Response) -> str:
        return re.search(r'name="csrf-token" content="(\w+)"', response.text)[1]

    def call(self, method: str, path: str, status: int | None = None, **how):
        """Returns the JSON of a response with this status (any that is well, by default)."""
        response = self.http.request(method, path, **how)
        assert response.status_code == status if status else response.is_success, (response.status_code, response.text)
        return response.json() if response.content else None

    def conversation(self, **settings) -> str:
        return self.call("POST", "/api/conversations", json=settings)["id"]

    def ask(self, conversation: str, content: str, status: int | None = None, **more):
        body = {"client_id": str(uuid.uuid4()), "content": content, "models": ["scripted"]} | more
        return self.call("POST", f"/api/conversations/{conversation}/messages", status, json=body)

    def frames(self, stream: str, last_id: str = ""):
        """Yields (id, event, data) of a stream."""
        headers = {"Last-Event-ID": last_id} if last_id else {}
        with self.http.stream("GET", stream, headers=headers) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            found: dict[str, str] = {}
            for line in response.iter_lines():
                name, _, value = line.partition(": ")
                if line:
                    found[name] = value
                elif "event" in found:
                    yield found.get("id", ""), found["event"], json.loads(found["data"])
                    found = {}

    def answer(self, asked) -> dict:
        """Returns the first answer to a question once it is there."""
        return self.answers(asked)[0]

    def answers(self, asked) -> list[dict]:
        """Returns the answers to a question once they are there."""
        done = {data["g"]: data["message"] for _, event, data in self.frames(asked["stream"]) if event == "done"}
        return [done[answer["id"]] for answer in asked["answers"]]

    def thread(self, conversation: str) -> dict:
        return self.call("GET", f"/api/conversations/{conversation}")


class Server:
    """`babl serve` on a data folder, with an engine that does as the questions say."""

    def __init__(self, data: Path, environment: dict[str, str], models: Path | None = None):
        self.data, self.environment, self.models = data, environment, models or data
        self.log = data.with_suffix(".log")
        self.data.mkdir(exist_ok=True)
        self.address = ""
        self.process: subprocess.Popen | None = None

    def start(self, *options: str) -> "Server":
        command = [sys.executable, "-m", "babl.cli", "serve", "--data", str(self.data), "--models", str(self.models)]
        environment = os.environ | {"BABL_SCRIPTED": "1", "OMP_NUM_THREADS": "1"} | self.environment
        environment.setdefault("BABL_QUESTIONS_PER_MINUTE", "100000")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--port", "0", *options], env=environment, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 40
        while not (found := LINK.search(self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        self.link = found[1]
        self.address = self.link.split("/login")[0]
        return self

    def person(self) -> Person:
        """Returns somebody who has used the link in force."""
        links = re.findall(r"http://\S+token=\S+", self.log.read_text())
        return Person(self.address).enter(links[-1].removeprefix(self.address))

    def add_user(self, name: str) -> Person:
        """Returns a new user of a server with login, who is logged in."""
        command = [sys.executable, "-m", "babl.cli", "serve", "--data", str(self.data), "--add-user", name]
        subprocess.run(command, input=f"password-of-{name}\n", text=True, check=True, env=os.environ | self.environment)
        return Person(self.address).enter("/login/", username=name, password=f"password-of-{name}")

    def engine(self) -> psutil.Process:
        """Returns the process that owns the models."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if "babl.web.engine.process" in child.cmdline())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> int:
        """Returns the exit code of a server that was told to end."""
        if self.process is None:
            return 0
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.terminate()
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            _, alive = psutil.wait_procs(children, 5)
            for child in alive:
                child.kill()


class PostgreSQL:
    """A cluster of its own, which ends with the tests."""

    def __init__(self, programs: Path):
        self.folder = Path(tempfile.mkdtemp(prefix="babl-pg-"))
        self._as = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self._as:
            shutil.chown(self.folder, "postgres", "postgres")
        self._programs, self._data = programs, self.folder / "data"
        self._run("initdb", "-D", self._data, "-A", "trust", "-U", "babl", "-N", "-E", "UTF8", "--locale=C.UTF-8")
        self.control("start")

    def control(self, action: str) -> None:
        options = f"-k {self.folder} -c listen_addresses= -c fsync=off -c max_connections=60"
        log = ("-l", self.folder / "log", "-o", options) if action != "stop" else ()
        mode = ("-m", "immediate") if action != "start" else ()
        self._run("pg_ctl", "-D", self._data, *mode, "-w", *log, action)

    def _run(self, program: str, *arguments: object) -> None:
        command = [*self._as, str(self._programs / program), *map(str, arguments)]
        result = subprocess.run(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert result.returncode == 0, result.stdout

    def database(self) -> str:
        """Returns the address of a new, empty database."""
        name = f"test_{uuid.uuid4().hex[:8]}"
        self._run("createdb", "-h", self.folder, "-U", "babl", name)
        return f"postgres://babl@{str(self.folder).replace('/', '%2F')}/{name}"

    def end(self) -> None:
        self.control("stop")
        shutil.rmtree(self.folder)


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items):
    """On PostgreSQL, the tests that are not about what is stored are slow ones: they take another minute."""
    for item in items:
        if "postgresql" in item.name and item.path.stem in ("test_api", "test_faults", "test_isolation", "test_serve"):
            item.add_marker("slow")


@contextlib.contextmanager
def cluster():
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if not found and not (on_path := shutil.which("initdb")):
        pytest.skip("no PostgreSQL server here (Debian: apt-get install postgresql)")
    made = PostgreSQL(found[-1].parent if found else Path(on_path).parent)
    yield made
    made.end()


@pytest.fixture(scope="session")
def postgresql():
    with cluster() as made:
        yield made


@pytest.fixture
def own_postgresql():
    """A cluster that a test may start anew."""
    with cluster() as made:
        yield made


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def database(request):
    """The environment of a server on each kind of database; called, it makes a new one."""
    if request.param == "sqlite":
        return dict
    cluster = request.getfixturevalue("postgresql")
    return lambda: {"DATABASE_URL": cluster.database()}


@pytest.fixture(scope="session")
def serving():
    """A context manager: a server on a data folder, in an environment."""

    @contextlib.contextmanager
    def context(data: Path, environment: dict[str, str], models: Path | None = None):
        server = Server(data, environment, models)
        try:
            yield server.start()
        finally:
            server.end()

    return context


@pytest.fixture(scope="session")
def server(tmp_path_factory, database, serving):
    """One server for all tests that leave it as it is."""
    with serving(tmp_path_factory.mktemp("server"), database()) as this:
        yield this


@pytest.fixture(scope="session")
def me(server):
    return server.person()


@pytest.fixture
def own_server(tmp_path, database, serving):
    """A server that a test may end as it likes."""
    with serving(tmp_path / "data", database()) as this:
        yield this


@pytest.fixture(scope="session")
def shared_house(tmp_path_factory, database, serving):
    """A server with login."""
    environment = {"BABL_AUTH": "login", "SECRET_KEY": "x" * 50, "ALLOWED_HOSTS": "127.0.0.1"}
    with serving(tmp_path_factory.mktemp("house"), environment | database()) as this:
        yield this


@pytest.fixture(scope="session")
def make_model():
    """A function: the folder holds a tiny model of a family, sharp enough that no two tokens are equally likely."""

    def make(family, folder, seed=3):
        train_tokenizer([WORDS] * 4, 330, folder)
        model, _ = build_model(ModelConfig(family=family, shape=SHAPES[family], tokenizer=str(folder)), folder, seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
        save_pretrained(model, folder)
        return folder

    return make
