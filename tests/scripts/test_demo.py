import json

import pytest

from babl.data.squad import load_squad
from babl.scripts import demo


@pytest.mark.parametrize("family", demo.SHAPES)
def test_a_very_short_demo_leaves_all_it_promises(family, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "TRAIN_ARTICLES", 20)
    monkeypatch.setattr(demo, "DEV_ARTICLES", 3)
    monkeypatch.setattr(demo, "TRIAL_STEPS", 3)
    monkeypatch.setattr(demo, "RESERVE_SECONDS", 3600)  # nothing left: as few steps as there can be
    out = tmp_path / "demo"
    assert demo.run(out, family, minutes=1, seed=0) == 0
    report = json.loads((out / "report.json").read_text())
    assert list(report["arms"]) == ["none", "gold"]
    for arm in report["arms"].values():
        assert arm["grades"].keys() == {"type", "entity", "name"}
        assert arm["interval"] is None, "three articles are too few for one"
        assert (out / arm["model"].split("/")[-1] / "model.safetensors").exists()
    gold, none = report["arms"]["gold"]["exact"], report["arms"]["none"]["exact"]
    assert report["difference"] == pytest.approx(gold - none)
    assert report["dev_questions"] == len(load_squad(out / "data" / "dev.json"))
    html = (out / "report.html").read_text()
    assert html.count("<svg") == 2
    assert "src=" not in html and "<link" not in html and "@import" not in html, "nothing is fetched"
    printed = capsys.readouterr().out
    assert "babl query" in printed and "EM, 95 % interval" in printed
    assert all(line.split()[2] == "–" for line in printed.splitlines() if line.startswith(("none ", "gold ")))
    assert demo.run(out, family, minutes=1, seed=0) == 0, "a second demo takes the place of the first"
