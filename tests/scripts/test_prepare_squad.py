import hashlib
import http.server
import json
import threading

import pytest

from babl.data.fictional import fictional_corpus
from babl.data.squad import load_squad
from babl.errors import UserError
from babl.scripts.prepare_squad import main, prepare

CONTENT = json.dumps(fictional_corpus(30, 1)[0]).encode()
BLOB = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()


@pytest.fixture
def server():
    """Serves CONTENT on loopback; `cut` breaks the next answer off, `ranges` says whether Range is honoured."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = 0
            if self.server.ranges and "Range" in self.headers:
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            self.server.starts.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            end = len(CONTENT) // 2 if self.server.cut else None
            self.server.cut = False
            self.wfile.write(CONTENT[start:end])

        def log_message(self, *args):
            """Quiet."""

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.cut, httpd.ranges, httpd.starts = False, True, []
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def run(folder, server, blob=BLOB):
    prepare(folder, {"train-v1.1.json": blob}, server.url, 0.2, 0)


def test_a_verified_file_is_cut_by_article_and_not_fetched_again(tmp_path, server):
    run(tmp_path, server)
    train, held = (load_squad(tmp_path / f"train-v1.1-{part}.json") for part in ("train", "validation"))
    assert len(train) + len(held) == len(load_squad(tmp_path / "train-v1.1.json"))
    assert not {e.title for e in train} & {e.title for e in held}
    run(tmp_path, server)
    assert server.starts == [0]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(tmp_path, server, ranges):
    server.cut, server.ranges = True, ranges
    with pytest.raises(UserError, match="run again to go on"):
        run(tmp_path, server)
    assert not (tmp_path / "train-v1.1.json").exists()
    run(tmp_path, server)
    assert server.starts == [0, len(CONTENT) // 2 if ranges else 0]
    assert (tmp_path / "train-v1.1.json").read_bytes() == CONTENT


def test_another_file_is_refused(tmp_path, server):
    with pytest.raises(UserError, match=f"git blob id {BLOB}, expected 123"):
        run(tmp_path, server, "123")
    assert not list(tmp_path.iterdir())


def test_without_a_network_it_says_what_to_do(tmp_path, capsys):
    assert main(["--to", str(tmp_path), "--base-url", "http://127.0.0.1:9"]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert f"put it at {tmp_path / 'train-v1.1.json'}" in error
