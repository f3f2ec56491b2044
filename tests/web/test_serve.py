import os
import re
import resource
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest


def refused(*arguments, before=None, **environment):
    """Returns the one line that `babl serve` says when it does not start; `before` is called in its process."""
    command = [sys.executable, "-m", "babl.cli", "serve", *map(str, arguments)]
    environment = os.environ | environment
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, preexec_fn=before)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1, result
    return result.stderr


def test_an_address_that_others_reach_needs_login(tmp_path):
    at = ("--data", tmp_path, "--host", "0.0.0.0", "--port", 0)
    assert refused(*at) == (
        "babl serve: --host is 0.0.0.0, which others can reach; set BABL_AUTH=login, SECRET_KEY, ALLOWED_HOSTS in the"
        " environment first\n"
    )
    assert "; set ALLOWED_HOSTS in the" in refused(*at, BABL_AUTH="login", SECRET_KEY="x")
    assert "; set BABL_AUTH=login in the" in refused(*at, SECRET_KEY="x", ALLOWED_HOSTS="example.org")
    assert "--host is 'example', expected an IP address" in refused("--data", tmp_path, "--host", "example")
    assert "BABL_AUTH is 'none', expected local or login" in refused("--data", tmp_path, "--port", 0, BABL_AUTH="none")


def test_what_is_taken_is_said(server, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port: 127.0.0.1:{port} cannot be used (Address already in use)" in refused(
            "--data", tmp_path, "--port", port
        )
    assert "--port is 70000, expected 0 to 65535" in refused("--data", tmp_path, "--port", 70000)
    assert f"--data: another server uses {server.data}" in refused("--data", server.data, "--port", 0)
    if server.environment:  # PostgreSQL, which two could share without sharing the folder
        at = ("--data", tmp_path / "other", "--port", 0)
        assert "DATABASE_URL: another server uses this database" in refused(*at, **server.environment)
    nowhere = f"--models: {tmp_path / 'none'} is not a folder; name one that has models, or a model"
    assert nowhere in refused("--data", tmp_path / "new", "--models", tmp_path / "none")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    assert "file cannot be written (" in refused("--data", tmp_path / "file", "--port", 0)


@pytest.mark.parametrize("name", ["a folder that was there", "one that is new"])
def test_nobody_else_can_read_what_is_stored(tmp_path, serving, name):
    data = tmp_path / name
    if name == "a folder that was there":
        data.mkdir()
        for file in ("babl.sqlite3", "serve.lock"):
            (data / file).touch()
            (data / file).chmod(0o644)
        data.chmod(0o777)
    mask = os.umask(0o022)
    try:
        with serving(data, {}, tmp_path) as server:
            server.person().conversation(title="secret")
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in data.iterdir()}
            engine = psutil.Process(server.process.pid).children()
            sockets = [
                Path(child.cmdline()[child.cmdline().index("--socket") + 1])
                for child in engine
                if len(child.cmdline()) > 4
            ]
            assert sockets and all(stat.S_IMODE(path.parent.stat().st_mode) == 0o700 for path in sockets)
    finally:
        os.umask(mask)
    assert set(modes) == {"babl.sqlite3", "babl.sqlite3-wal", "babl.sqlite3-shm", "secret-key", "serve.lock"}
    assert set(modes.values()) == {0o600} and stat.S_IMODE(data.stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_private_is_refused(tmp_path):
    everybodys = tmp_path / "everybodys"
    everybodys.mkdir()
    everybodys.chmod(0o1777)
    assert f"--data: {everybodys} is a folder that all accounts share; choose one" in refused("--data", everybodys)
    assert list(everybodys.iterdir()) == []


@pytest.mark.parametrize("damaged", [b"", b"short", b"x" * 63 + b"\xff"])
def test_a_damaged_key_is_said(tmp_path, damaged):
    (tmp_path / "secret-key").write_bytes(damaged)
    assert f"secret-key has {len(damaged)} bytes that are not a key, expected 64 letters" in refused(
        "--data", tmp_path, "--port", 0
    )
    assert (tmp_path / "secret-key").read_bytes() == damaged


def test_a_start_on_a_full_disk_leaves_no_half_key(tmp_path):
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # noqa: E731
    at = ("--data", tmp_path, "--port", 0)
    assert f"--data: {tmp_path} cannot be written (File too large)" in refused(*at, before=full)
    assert not list(tmp_path.glob("secret-key*"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("DATABASE_URL", "nonsense", "DATABASE_URL begins with 'nonsense', expected postgres://USER"),
        ("DATABASE_URL", "mysql://u:hidden@h/db", "DATABASE_URL begins with 'mysql', expected postgres://USER"),
        ("DATABASE_URL", "postgres://u:hid/den@h/db", "DATABASE_URL cannot be read, expected postgres://USER"),
        ("DATABASE_URL", "postgres://u:hidden@h", "DATABASE_URL names no database"),
        ("BABL_QUESTIONS_PER_MINUTE", "0", "BABL_QUESTIONS_PER_MINUTE is '0', expected 1 to"),
        ("BABL_QUESTIONS_PER_MINUTE", "many", "BABL_QUESTIONS_PER_MINUTE is 'many', expected 1 to"),
        ("BABL_TRUSTED_PROXIES", "10.0.0.1, there", "BABL_TRUSTED_PROXIES has 'there', expected addresses or networks"),
    ],
)
def test_an_environment_that_makes_no_sense_is_said(tmp_path, name, value, said):
    line = refused("--data", tmp_path, "--port", 0, **{name: value})
    assert said in line and "hid" not in line


def test_of_two_servers_started_at_once_on_a_port_one_serves(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "babl.cli", "serve", "--port", str(port), "--data"]
    both = [
        subprocess.Popen(
            [*command, str(tmp_path / name)], env=os.environ | {"BABL_SCRIPTED": "1"}, stderr=subprocess.PIPE, text=True
        )
        for name in "ab"
    ]
    try:
        while all(each.poll() is None for each in both):
            time.sleep(0.05)
        refused_one = next(each for each in both if each.poll() is not None)
        assert refused_one.returncode == 2
        assert refused_one.stderr.read() == (
            f"babl serve: --port: 127.0.0.1:{port} cannot be used (Address already in use); choose another one\n"
        )
        assert httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=30).text == "ok\n"
    finally:
        for each in both:
            each.terminate()
            each.wait(20)


def test_two_servers_of_a_host_do_not_log_each_other_out(server, tmp_path, serving):
    """httpx keeps cookies as browsers do: by host, for all of its ports."""
    with serving(tmp_path / "another", {}, tmp_path) as another, httpx.Client() as browser:
        for each in (server, another):
            link = re.findall(r"http://\S+token=\S+", each.log.read_text())[-1]
            assert browser.get(link).status_code == 302
        for each in (server, another):
            assert browser.get(each.address).status_code == 200


def test_the_one_user_of_a_machine_may_ask_as_fast_as_the_engine_answers(tmp_path, serving):
    with serving(tmp_path / "data", {"BABL_QUESTIONS_PER_MINUTE": ""}, tmp_path) as server:
        me = server.person()
        key = {"Authorization": f"Bearer {me.call('POST', '/api/keys', json={'name': 'k'})['key']}"}
        asked = {"model": "scripted", "question": "delay=0 tokens=1 x"}
        with httpx.Client(base_url=server.address, headers=key, timeout=30) as http:
            assert {http.post("/v1/qa", json=asked).status_code for _ in range(130)} == {200}
        me.ask(me.conversation(), "tokens=1 x", 201)


def test_a_database_that_is_not_there_is_said(tmp_path):
    url = "postgres://nobody@127.0.0.1:9/none"
    assert "the database cannot be used: " in refused("--data", tmp_path, "--port", 0, DATABASE_URL=url)


def test_the_link_works_once_and_the_session_stays(own_server):
    link = own_server.link
    first = httpx.get(link)
    assert first.status_code == 302 and "HttpOnly" in first.headers["set-cookie"]
    assert httpx.get(link).status_code == 401 and "That link was used" in httpx.get(link).text
    assert httpx.get(own_server.address).status_code == 401
    assert own_server.person().conversation(), "the terminal shows the next one"
    cookies = dict(first.cookies)
    assert httpx.get(own_server.address, cookies=cookies).status_code == 200
    assert own_server.end() == 0
    own_server.start()
    assert httpx.get(own_server.address, cookies=cookies).status_code == 200, "the key was kept"
    key = own_server.data / "secret-key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and len(key.read_text()) > 50


def test_sessions_end(own_server):
    me = own_server.person()
    me.http.post("/logout/")
    assert me.http.get("/api/conversations").status_code == 401


def test_a_short_password_is_refused(tmp_path):
    command = [sys.executable, "-m", "babl.cli", "serve", "--data", str(tmp_path), "--add-user", "ann"]
    result = subprocess.run(command, input="short\n", capture_output=True, text=True)
    assert result.returncode == 2 and re.match("babl serve: This password is too short", result.stderr)


def test_models_and_migrations_agree(tmp_path):
    code = (
        "from babl.web.serve import ServerOptions, prepare\nfrom pathlib import Path\nimport sys\n"
        "prepare(ServerOptions(data=Path(sys.argv[1])))\nfrom django.core.management import call_command\n"
        "call_command('makemigrations', check=True, dry_run=True)\ncall_command('check', fail_level='WARNING')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
