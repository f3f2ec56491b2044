import json
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture(scope="module")
def unanswerable(tmp_path_factory):
    """A file of version 2.0: four questions, one without an answer."""
    context = "The mill of Ilm was built in 1840 by Ada Born."
    golds = {"a": ["1840"], "b": ["Ada Born", "Born"], "c": ["the"], "d": []}
    qas = [
        {"id": qid, "question": f"{qid}?", "answers": [{"text": t, "answer_start": 0} for t in texts]}
        for qid, texts in golds.items()
    ]
    path = tmp_path_factory.mktemp("unanswerable") / "v2.json"
    tree = {"version": "v2.0", "data": [{"title": "Ilm", "paragraphs": [{"context": context, "qas": qas}]}]}
    path.write_text(json.dumps(tree))
    return path


def test_what_evaluate_writes_for_version_two_is_what_score_takes(capsys, model, unanswerable, tmp_path):
    code, out, err = babl(capsys, "evaluate", model, unanswerable, "--out", tmp_path, "--json")
    assert code == 0
    assert "v2.json: 4 questions, 4 answers: 0 exact, 0 whitespace, 3 moved, 1 not found" in err
    metrics = json.loads(out)
    probabilities = json.loads((tmp_path / "na_prob.json").read_text())
    assert probabilities.keys() == set("abcd") and all(0 < p < 1 for p in probabilities.values())
    predictions, given = tmp_path / "predictions.json", ("--na-prob", tmp_path / "na_prob.json")
    code, out, _ = babl(capsys, "score", unanswerable, predictions, *given)
    scores = json.loads(out)
    assert code == 0 and {"best_exact", "best_f1_thresh", "pr_oracle_ap", "NoAns_exact"} < scores.keys()
    assert scores == {key: metrics[key] for key in scores}


def test_the_version_of_a_file_is_kept_where_all_questions_left_have_answers(capsys, model, unanswerable, tmp_path):
    tree = json.loads(unanswerable.read_text())
    qas = tree["data"][0]["paragraphs"][0]["qas"]
    qas.pop()
    part, predictions = tmp_path / "part.json", tmp_path / "p.json"
    part.write_text(json.dumps(tree))
    predictions.write_text(json.dumps({"a": "1840", "b": "x", "c": ""}))
    na_prob = tmp_path / "na.json"
    na_prob.write_text(json.dumps({"a": 0.9, "b": 0.1, "c": 0.2}))
    _, out, _ = babl(capsys, "score", part, predictions, "--na-prob", na_prob, "--na-threshold", 0.5)
    assert json.loads(out)["exact"] == pytest.approx(100 / 3)  # "the" counts as nothing, and the sure 1840 is kept back
    _, out, _ = babl(capsys, "compare", part, predictions, predictions, "--json")
    assert json.loads(out)["version"] == "2.0"
    _, out, _ = babl(capsys, "evaluate", model, part, "--limit", 1, "--json", "--max-new-tokens", 4)
    assert "exact" in json.loads(out)
    tree["version"] = "1.1"
    part.write_text(json.dumps(tree))
    code, _, err = babl(capsys, "score", part, predictions, "--na-prob", na_prob)
    assert code == 2 and "(--na-prob) are for SQuAD 2.0, but the data is of version 1.1" in err


def test_a_folder_of_another_evaluation_is_left_as_it_is(capsys, model, data, tmp_path):
    ask = ("evaluate", model, data, "--out", tmp_path, "--max-new-tokens", 4)
    assert babl(capsys, *ask)[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for other in (("--context", "none"), ("--limit", 5), ("--max-new-tokens", 5)):
        code, _, err = babl(capsys, *ask, *other)
        assert code == 2 and f"--out: {tmp_path} has " in err and "choose another folder" in err
    assert babl(capsys, *ask)[0] == 0  # the same one goes on
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_evaluate_prints_two_decimals(capsys, model, data):
    _, out, _ = babl(capsys, "evaluate", model, data, "--context", "none", "--max-new-tokens", 4)
    assert "exact_interval" in out and not [word for word in out.split() if len(word.partition(".")[2]) > 3]


def test_faulty_and_contradictory_records_are_read_on_request(capsys, tmp_path):
    rows = [{"id": str(i), "question": "q?", "context": "c d", "answers": ["d"]} for i in range(20)]
    rows[3]["answers"], rows[4]["is_impossible"] = None, True
    path, predictions = tmp_path / "data.jsonl", tmp_path / "p.json"
    path.write_text("\n".join(map(json.dumps, rows)))
    predictions.write_text(json.dumps({str(i): "d" for i in range(20)}))
    code, out, err = babl(capsys, "score", path, predictions)
    assert (code, out) == (2, "") and "line 4.answers is null; no answer is" in err and "--faulty leave-out" in err
    code, out, err = babl(capsys, "score", path, predictions, "--faulty", "leave-out")
    assert err == f"{path}: 19 questions; 1 records left out that cannot be read\n"
    assert code == 0 and json.loads(out) == {"exact_match": 100.0, "f1": 100.0, "total": 19}


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory):
    """A training file, and a corpus with the contexts of the dev file and one text of its own."""
    folder = tmp_path_factory.mktemp("overlapping")
    train, dev = fictional_corpus(1, 2)
    (folder / "train.json").write_text(json.dumps(train))
    contexts = [paragraph["context"] for article in dev["data"] for paragraph in article["paragraphs"]]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in contexts))
    (folder / "b.txt").write_text("It was none of these.\n")
    return folder


def test_overlap_reports_what_is_shared_to_people_and_to_programs(capsys, data, overlapping, tmp_path):
    files = [overlapping / "train.json", data, "--corpus", overlapping / "a.jsonl", overlapping / "b.txt"]
    code, out, _ = babl(capsys, "overlap", *files, "--json", "--out", tmp_path / "new")
    assert code == 0
    told = json.loads(out)
    assert told == json.loads((tmp_path / "new" / "overlap.json").read_text())
    assert told["test"]["questions"] == 46 and sum(told["classes"]["strict"].values()) == 46
    assert told["titles"] == [] and told["contexts"]["equal"] == 0
    assert told["corpus"]["documents"] == 1 + len({row["context"] for row in rows_of(data)})
    assert told["corpus"]["fields"]["context"]["longest"]["whole"] == 46
    assert len(told["declared"]) > 5 and len(told["biases"]) == 3
    questions = [json.loads(line) for line in (tmp_path / "new" / "questions.jsonl").read_text().splitlines()]
    assert [q["id"] for q in questions] == [row["id"] for row in rows_of(data)]
    assert sum(q["strict"] == "answer" for q in questions) == told["classes"]["strict"]["answer"] > 0
    assert all(q["corpus"]["context"]["longest"] == q["corpus"]["context"]["words"] for q in questions)
    code, out, _ = babl(capsys, "overlap", *files)
    assert code == 0 and out == (tmp_path / "new" / "overlap.md").read_text()
    assert "| 46 of 46 (100.0 %) |" in out and "T5 v1.0" in out


def rows_of(path):
    """Each question, its id and context."""
    for article in json.loads(Path(path).read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                yield {"id": qa["id"], "context": paragraph["context"]}


def test_overlap_without_a_corpus_says_nothing_of_one(capsys, data, overlapping):
    code, out, _ = babl(capsys, "overlap", overlapping / "train.json", data)
    assert code == 0 and "## In the corpus" not in out


def test_overlap_names_what_is_wrong(capsys, data, overlapping, tmp_path):
    (tmp_path / "file").write_text("")
    train = overlapping / "train.json"
    for arguments, message in [
        (["absent.json", data], "absent.json: no such data file"),
        ([train, data, "--corpus", "absent.txt"], "absent.txt: no such corpus file"),
        ([train, data, "--corpus", overlapping / "b.txt", train], 'train.json: line 1 has no "text"'),
        ([train, data, "--out", tmp_path / "file"], "--out: "),
    ]:
        code, out, err = babl(capsys, "overlap", *arguments)
        assert (code, out) == (2, "") and err.startswith("babl overlap: ") and message in err


def test_query_answers_with_and_without_context(capsys, model, tmp_path):
    (tmp_path / "c.txt").write_text("somebody did it")
    for extra in ([], ["--context", "somebody did it"], ["--context-file", tmp_path / "c.txt"]):
        code, out, _ = babl(capsys, "query", model, "who?", "--json", *extra)
        assert code == 0
        assert 0 <= json.loads(out)["probability"] <= 1


STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\nLily's mom said,"
)


def test_generate_writes_the_documented_story(capsys, shared):
    folder = shared / "checkpoints" / "stories260K"
    code, out, err = babl(capsys, "generate", folder, "", "--max-new-tokens", 130)
    assert code == 0 and out.startswith(STORY)
    assert err == "babl generate: ended at --max-new-tokens 130\n", "a limit is said, and not on stdout"
    code, out, _ = babl(capsys, "generate", folder, "", "--max-new-tokens", 130, "--json")
    answer = json.loads(out)
    assert answer["text"].startswith(STORY) and (answer["finish"], len(answer["ids"])) == ("length", 130)
    drawn = [babl(capsys, "generate", folder, "One", "--temperature", 1, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    code, out, _ = babl(capsys, "generate", folder, "Once", "--stop", ".", "--num-beams", 2)
    assert code == 0 and "." not in out


def test_long_contexts_are_read_through_windows_that_fit_the_model(capsys, shared):
    folder = shared / "checkpoints" / "stories260K"  # 512 positions
    context = "Lily saw a big ball. " * 200
    code, out, _ = babl(capsys, "query", folder, "What did Lily see?", "--context", context, "--json")
    assert code == 0 and json.loads(out)["windows"] > 3
    code, _, err = babl(capsys, "generate", folder, context)
    assert code == 2 and "expected fewer than the model's context, 512" in err


@pytest.fixture(scope="module")
def family_folders(tmp_path_factory):
    """A folder with an untrained model of each family, and one that is none."""
    folder = tmp_path_factory.mktemp("models")
    shapes = {
        "t5": {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1},
        "llama": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1},
        "bloom": {"hidden_size": 64, "n_layer": 1},
    }
    for family, shape in shapes.items():
        train_tokenizer(["Question: who Answer: somebody"], 300, folder / family)
        save_pretrained(build_model(ModelConfig(family=family, shape=shape), folder / family, 0)[0], folder / family)
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


def test_models_lists_what_is_there_and_whether_it_fits(capsys, family_folders, monkeypatch):
    code, out, _ = babl(capsys, "models", "--models", family_folders, "--json")
    rows = {row["model"].split("/")[-1]: row for row in json.loads(out)}
    assert code == 0 and rows.keys() == {"t5", "llama", "bloom", "other"}
    for family in ("t5", "llama", "bloom"):
        row = rows[family]
        assert (row["family"], row["dtypes"], row["fits"]) == (family, "F32", True)
        assert 4 * row["parameters"] < row["bytes"]
        assert row["needed_bytes"] == row["weights_bytes"] + row["cache_bytes"] + (256 << 20) <= row["free_bytes"]
    assert rows["llama"]["context"] == 2048
    assert "model_type is 'gpt2'" in rows["other"]["unusable"]
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 1000}))
    _, out, _ = babl(capsys, "models", "--models", family_folders)
    assert out.count("does not fit: needs ") == 3 and "context 2048" in out and "unusable: " in out
    code, _, err = babl(capsys, "models", "--models", family_folders / "absent")
    assert code == 2 and "absent is no folder; `babl pull` makes one" in err


@pytest.mark.parametrize("family", ["t5", "llama", "bloom"])
def test_export_leaves_the_model_alone_in_a_folder(capsys, family_folders, tmp_path, family):
    import transformers

    code, out, _ = babl(capsys, "export", family_folders / family, tmp_path / "half", "--dtype", "bfloat16")
    assert (code, out.strip()) == (0, str(tmp_path / "half"))
    _, info = transformers.AutoModel.from_pretrained(tmp_path / "half", output_loading_info=True)
    assert not info["missing_keys"]
    facts = json.loads(babl(capsys, "info", tmp_path / "half", "--json")[1])
    assert (facts["family"], facts["dtypes"], facts["whole"]) == (family, "BF16", "yes")
    code, _, err = babl(capsys, "export", family_folders / family, tmp_path / "half")
    assert code == 2 and "half is there already; remove it, or choose another folder" in err


def test_export_refuses_a_damaged_checkpoint(capsys, family_folders, tmp_path):
    babl(capsys, "export", family_folders / "t5", tmp_path / "a")
    weights = tmp_path / "a" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    code, _, err = babl(capsys, "export", tmp_path / "a", tmp_path / "b")
    assert code == 2 and "model.safetensors is not what was written" in err
    assert not (tmp_path / "b").exists()


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
            "--context is 'golf', expected one of none, blank, random",
        ),
        (["evaluate", "MODEL", "DATA", "--limit", "0"], "--limit is 0, expected at least 1"),
        (["query", "MODEL", "q", "--kernels", "fast"], "--kernels is 'fast', expected one of auto, on, off"),
        (["evaluate", "MODEL", "DATA", "--limit", "1", "--out", "/dev/null/x"], "--out: /dev/null/x cannot be written"),
        (["score", "DATA", "absent.json"], "absent.json: no such file"),
        (["query", "MODEL", "q", "--context-file", "absent.txt"], "--context-file: absent.txt cannot be read"),
        (["train", "absent.toml"], "absent.toml: no such configuration file"),
        (["demo", "--minutes", "0"], "--minutes is 0, expected at least 1"),
        (["generate", "MODEL", "x", "--max-new-tokens", "0"], "max_new_tokens is 0, expected at least 1"),
        (["generate", "MODEL", "x", "--top-p", "0"], "top_p is 0.0, expected more than 0"),
        (["generate", "MODEL", "x", "--device", "mps"], "--device is 'mps', but torch finds"),
        (["chat", "MODEL", "--resume", "absent"], "--resume: no conversation 'absent' in"),
        (["info", "absent"], "absent: no such model folder"),
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


@pytest.mark.parametrize(("given", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(given, found, tmp_path):
    """It is set before torch is loaded, which reads it then, and handed on to what `babl` starts."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    code = "import os, sys; from babl.cli import main; assert 'torch' not in sys.modules; main(['runs', sys.argv[1]]); "
    code += "assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{found}\n"
