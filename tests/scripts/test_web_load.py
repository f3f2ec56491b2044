import json

import pytest

from babl.scripts.web_load import main


def test_a_load_is_put_on_a_server_and_nothing_is_lost(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DATABASE_URL", raising=False)
    out = tmp_path / "load.json"
    for _ in range(2):
        assert main(["--users", "4", "--seconds", "1", "--out", str(out)]) == 0, capsys.readouterr().err
    kept = json.loads(out.read_text())
    assert kept["machine"]["cpus"] and len(kept["rows"]) == 2
    row = kept["rows"][0]
    assert (row["model"], row["database"], row["users"]) == ("scripted", "SQLite", 4)
    assert row["answers"] >= 4 and row["errors"] == 0 and row["all errors"] == []
    assert len(row["all health_seconds"]) > 5 and min(row["threads"]) > 0 and min(row["memory MiB"]) > 10


@pytest.mark.parametrize("wrong", [("--users", "0"), ("--seconds", "0"), ("--seconds", "nan")])
def test_a_load_of_nobody_or_no_time_is_refused(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*wrong])
    assert "expected at least 1 and more than 0" in capsys.readouterr().err
