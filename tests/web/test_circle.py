"""The whole circle: a model answers, people correct it, it learns from that, and the new model can be asked."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

from babl.data.fictional import fictional_corpus
from babl.models import save_pretrained
from babl.models.build import ModelConfig, build_model
from babl.text import train_tokenizer

CONFIG = Path(__file__).parents[2] / "configs" / "debug_cpu.toml"
SHAPE = "{d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1, num_decoder_layers=1, dropout_rate=0.1}"


def questions():
    """Yields some questions of an embedded corpus with their context and the place of their answer."""
    for article in fictional_corpus(3, 2)[0]["data"]:
        paragraph = article["paragraphs"][0]
        for qa in paragraph["qas"][:2]:
            (answer, *_) = qa["answers"]
            yield qa["question"], paragraph["context"], answer["answer_start"], answer["text"]


def test_corrections_train_a_model_that_appears_beside_the_old_one(tmp_path, serving):
    models = tmp_path / "models"
    texts = [f"question: {question} context: {context}" for question, context, _, _ in questions()]
    (models / "tiny").mkdir(parents=True)
    train_tokenizer(texts, 400, models / "tiny")
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
    save_pretrained(build_model(ModelConfig(shape=shape), models / "tiny", 0)[0], models / "tiny")
    with serving(tmp_path / "data", {"BABL_SCRIPTED": "0"}, models) as server:
        me = server.person()
        id = me.conversation()
        for question, context, start, text in questions():
            passage = me.call("POST", "/api/passages", json={"text": context})["id"]
            settings = {"max_new_tokens": 4}
            answer = me.answer(me.ask(id, question, models=["tiny"], passage=passage, settings=settings))
            assert answer["status"] == "done", answer
            judgement = {"good": False, "span": [start, start + len(text)]}
            me.call("PUT", f"/api/messages/{answer['id']}/feedback", json=judgement)
        out = tmp_path / "corrections.json"
        babl("feedback", "export", out, "--test-share", "0.3", "--data", server.data)
        run = [f"run.dir={models / 'runs'}", "run.name=corrected", f"model.shape={SHAPE}", "model.tokenizer_size=400"]
        data = [f"data.train={out}", f"data.validation={tmp_path / 'corrections-test.json'}"]
        babl("train", CONFIG, *run, *data, "train.steps=4", "train.validate_every=2", "train.save_every=2")
        names = {model["name"]: model["state"] for model in me.call("GET", "/api/models")["models"]}
        (new,) = [name for name in names if "corrected" in name]
        assert names[new] == "unloaded" and names["tiny"] == "loaded"
        body = {"client_id": str(uuid.uuid4()), "model": new}
        again = me.answer(me.call("POST", f"/api/messages/{answer['id']}/again", json=body))
        assert again["status"] == "done" and again["model"] == new and again["weights"] != answer["weights"]
        exported = json.loads(me.http.get("/api/feedback/export?test_share=0.3").content)
        assert exported == json.loads(out.read_text()), "the page gives the same file"


def babl(*arguments):
    command = [sys.executable, "-m", "babl.cli", *map(str, arguments)]
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
