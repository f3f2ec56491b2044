import subprocess
from pathlib import Path

import pytest

from babl import files


@pytest.mark.parametrize("content", ["é\n", b"\0\xff"])
def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path, content):
    target = tmp_path / "a.json"
    target.write_text("before")
    files.write_whole(target, content)
    assert target.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_write_that_fails_leaves_the_old_content_alone(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    target = tmp_path / "a.json"
    target.write_text("before")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(target, "after")
    assert target.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_content_is_on_disk_before_the_name_is_given(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr("babl.files.sync", lambda path: done.append(("sync", path.name)))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (done.append(("rename", to.name)), rename(self, to))[1])
    files.write_whole(tmp_path / "a", "x")
    assert done == [("sync", ".a.tmp"), ("rename", "a"), ("sync", tmp_path.name)]


def test_the_hash_is_that_of_sha256sum(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(path.name.encode() * 100_000)
    said = subprocess.run(["sha256sum", *paths], capture_output=True, text=True, check=True).stdout.splitlines()
    hashes = [line.split()[0] for line in said]
    assert [files.file_hash(path) for path in paths] == hashes
    assert files.joint_hash(paths[:1]) == hashes[0]
    joined = subprocess.run(["sha256sum"], input="".join(hashes), capture_output=True, text=True, check=True).stdout
    assert files.joint_hash(paths) == joined.split()[0]
