import os
import re
import socket
import stat
import subprocess
import sys

import httpx


def refused(*arguments, **environment):
    """Returns the one line that `babl serve` says when it does not start."""
    command = [sys.executable, "-m", "babl.cli", "serve", *map(str, arguments)]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=30)
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
        assert f"--port: 127.0.0.1:{port} cannot be listened at (Address already in use)" in refused(
            "--data", tmp_path, "--port", port
        )
    assert "--port is 70000, expected 0 to 65535" in refused("--data", tmp_path, "--port", 70000)
    assert f"--data: another server has {server.data}" in refused("--data", server.data, "--port", 0)
    if server.environment:  # PostgreSQL, which two could share without sharing the folder
        at = ("--data", tmp_path / "other", "--port", 0)
        assert "DATABASE_URL: another server has this database" in refused(*at, **server.environment)
    (tmp_path / "file").touch()
    assert "file cannot be written (" in refused("--data", tmp_path / "file", "--port", 0)


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
    cookies = {"babl_session": first.cookies["babl_session"]}
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
        "from babl.web.serve import Place, prepare\nfrom pathlib import Path\nimport sys\n"
        "prepare(Place(data=Path(sys.argv[1])))\nfrom django.core.management import call_command\n"
        "call_command('makemigrations', check=True, dry_run=True)\ncall_command('check', fail_level='WARNING')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
