import json

import pytest

from babl.cli import main
from babl.data.fictional import fictional_corpus
from babl.models import save_pretrained
from babl.models.build import ModelConfig, build_model
from babl.text import train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained model folder."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(["question: who context: somebody did it"], 300, folder)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
    save_pretrained(build_model(ModelConfig(shape=shape), folder, 0)[0], folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dev.json"
    path.write_text(json.dumps(fictional_corpus(1, 2)[1]))
    return str(path)


def babl(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_evaluate_writes_predictions_that_score_agrees_with(capsys, model, data, tmp_path):
    code, out, _ = babl(capsys, "evaluate", model, data, "--out", tmp_path, "--json", "--context", "none")
    assert code == 0
    metrics = json.loads(out)
    assert (
        metrics["total"] == 46 and metrics["context"] == "none" and set(metrics["grades"]) == {"type", "entity", "name"}
    )
    code, out, _ = babl(capsys, "score", data, tmp_path / "predictions.json")
    assert code == 0
    assert json.loads(out) == {key: metrics[key] for key in ("exact_match", "f1", "total")}


def test_query_answers_with_and_without_context(capsys, model, tmp_path):
    (tmp_path / "c.txt").write_text("somebody did it")
    for extra in ([], ["--context", "somebody did it"], ["--context-file", tmp_path / "c.txt"]):
        code, out, _ = babl(capsys, "query", model, "who?", "--json", *extra)
        assert code == 0
        assert 0 <= json.loads(out)["probability"] <= 1


def test_info_and_doctor_describe(capsys, model):
    assert json.loads(babl(capsys, "info", model, "--json")[1])["family"] == "t5"
    assert "torch" in json.loads(babl(capsys, "doctor", "--json")[1])


def test_missing_predictions_must_be_allowed_aloud(capsys, data, tmp_path):
    (tmp_path / "p.json").write_text("{}")
    code, _, err = babl(capsys, "score", data, tmp_path / "p.json")
    assert code == 2 and "46 of 46 predictions missing" in err and "--missing zero" in err
    code, out, _ = babl(capsys, "score", data, tmp_path / "p.json", "--missing", "zero")
    assert code == 0 and json.loads(out)["missing"] == 46


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "MODEL", "absent.json"], "absent.json: no such data file"),
        (["evaluate", "absent", "DATA"], "absent: no such model folder"),
        (
            ["evaluate", "MODEL", "DATA", "--context", "golf"],
            "--context is 'golf', expected one of none, gold; did you mean",
        ),
        (["evaluate", "MODEL", "DATA", "--limit", "0"], "--limit is 0, expected at least 1"),
        (["evaluate", "MODEL", "DATA", "--limit", "1", "--out", "/dev/null/x"], "--out: /dev/null/x cannot be written"),
        (["score", "DATA", "absent.json"], "absent.json: no such file"),
        (["query", "MODEL", "q", "--context-file", "absent.txt"], "--context-file: absent.txt cannot be read"),
        (["train", "absent.toml"], "absent.toml: no such configuration file"),
        (["demo", "--minutes", "0"], "--minutes is 0, expected at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(capsys, model, data, arguments, message):
    code, out, err = babl(capsys, *({"MODEL": model, "DATA": data}.get(a, a) for a in arguments))
    assert (code, out) == (2, "")
    assert message in err and len(err.strip().splitlines()) == 1


def test_a_model_without_a_tokenizer_is_named(capsys, model, tmp_path):
    import shutil

    folder = tmp_path / "bare"
    shutil.copytree(model, folder)
    (folder / "tokenizer.json").unlink()
    code, _, err = babl(capsys, "query", folder, "who?")
    assert code == 2 and "no tokenizer here" in err


def test_demo_does_not_clear_a_folder_that_is_not_its_own(capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, err = babl(capsys, "demo", "--out", tmp_path)
    assert code == 2 and "holds something that is not a demo" in err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
