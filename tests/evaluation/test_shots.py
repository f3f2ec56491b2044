"""Worked examples before each question: which, in which words, and how many; ids are held to transformers'."""

import json

import pytest
from transformers import AutoTokenizer

from babl.cli import main
from babl.data.squad import parse_squad
from babl.errors import UserError
from babl.evaluation.shots import draw_shots
from babl.generation import Engine
from babl.models import save_pretrained
from babl.models.build import ModelConfig, build_model
from babl.text import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
LLAMA = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
MILLS = {
    "Bex": [("Ada built the mill of Bex in 1840, beside the old bridge.", "Who built it?", "Ada")],
    "Arn": [
        ("The long paragraph of Arn says in many words that Bo sold the mill.", "Who sold it?", "Bo"),
        ("Cy bought the mill.", "Who bought it?", "Cy"),
        ("Di burnt down the mill.", "Who burnt it?", "Di"),
    ],
    "Col": [("Ed drew the mill of Col.", "Who drew it?", "Ed")],
}
ASKED = {"Dun": [("Flo saw the mill of Dun, and Ed left.", "Who saw it?", "Flo"), ("Ed left.", "Who left?", "Ed")]}


def squad(articles):
    data, number = [], 0
    for title, rows in articles.items():
        paragraphs = []
        for context, question, answer in rows:
            number += 1
            answers = [{"text": answer, "answer_start": context.index(answer)}]
            qas = [{"id": f"{title}{number}", "question": question, "answers": answers}]
            paragraphs.append({"context": context, "qas": qas})
        data.append({"title": title, "paragraphs": paragraphs})
    return {"version": "1.1", "data": data}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shots")
    words = [" ".join(f"{c} Question: {q} Answer: {a}" for c, q, a in rows) for rows in (MILLS | ASKED).values()]
    for name, family, shape in (("llama", "llama", LLAMA), ("short", "llama", LLAMA), ("t5", "t5", T5)):
        train_tokenizer(["Context: " + text for text in words], 400, folder / name)
        length = {"max_position_embeddings": 128 if name == "short" else 2048} if family == "llama" else {}
        model = build_model(ModelConfig(family=family, shape=shape | length), folder / name, 0)[0]
        save_pretrained(model, folder / name)
    settings = folder / "llama" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    (folder / "train.json").write_text(json.dumps(squad(MILLS)))
    (folder / "test.json").write_text(json.dumps(squad(ASKED)))
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """A function: what `babl evaluate` prints with these options, and the ids that the model was asked."""

    def run(model, *options):
        asked = []

        def answer(self, prompts, *rest, of=Engine.answer, **settings):
            asked.extend(prompts)
            return of(self, prompts, *rest, **settings)

        monkeypatch.setattr(Engine, "answer", answer)
        monkeypatch.chdir(folder)
        code = main(["evaluate", model, "test.json", "--max-new-tokens", "2", "--json", *options])
        monkeypatch.undo()
        out, err = capsys.readouterr()
        return code, json.loads(out) if code == 0 else None, err, asked

    return run


def reads(folder, text):
    return AutoTokenizer.from_pretrained(folder / "llama")(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("arm", ["gold", "none"])
def test_examples_stand_before_each_question_in_its_own_words(folder, run, arm):
    code, metrics, _, asked = run("llama", "--shots", "2", "--shots-from", "train.json", "--context", arm)
    shown = ["Context: Cy bought the mill.\n", f"Context: {MILLS['Bex'][0][0]}\n"]
    contexts = [f"Context: {context}\n" for context, _, _ in ASKED["Dun"]]
    if arm == "none":
        shown, contexts = ["", ""], ["", ""]
    head = f"{shown[0]}Question: Who bought it?\nAnswer: Cy\n\n{shown[1]}Question: Who built it?\nAnswer: Ada\n\n"
    assert code == 0
    assert asked == [
        reads(folder, f"{head}{context}Question: {question}\nAnswer:")
        for context, (_, question, _) in zip(contexts, ASKED["Dun"], strict=True)
    ]
    assert metrics["shots"] == metrics["shots_asked"] == 2 and metrics["shots_ids"] == ["Arn3", "Bex1"]


def test_a_chat_template_gets_them_as_turns(folder, run):
    options = ("--shots", "1", "--shots-from", "train.json", "--chat", "--system", "Be brief.")
    _, _, _, asked = run("llama", *options)
    turns = [("system", "Be brief."), ("user", "Context: Cy bought the mill.\n\nWho bought it?"), ("assistant", "Cy")]
    for ids, (context, question, _) in zip(asked, ASKED["Dun"], strict=True):
        said = [*turns, ("user", f"Context: {context}\n\n{question}")]
        messages = [{"role": role, "content": content} for role, content in said]
        tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
        assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_what_a_smaller_model_has_no_room_for_is_left_out_and_told(run):
    options = ("--shots", "3", "--shots-from", "train.json", "--max-source-tokens", "60")
    code, metrics, err, asked = run("short", *options)
    assert code == 0 and metrics["overlong"] == 0
    assert 0 < metrics["shots"] < 3 == metrics["shots_asked"] and len(metrics["shots_ids"]) == metrics["shots"]
    assert f"--shots: {metrics['shots']} of 3 examples are shown; {metrics['shots'] + 1} take " in err
    assert max(map(len, asked)) + 2 <= 128


def test_golds_that_examples_give_away_are_counted(run):
    options = ("--shots-from", "train.json", "--context", "none")
    assert run("llama", "--shots", "2", *options)[1]["shots_answer"] == 0
    assert run("llama", "--shots", "3", *options)[1]["shots_answer"] == 1, "Ed drew it, and Ed left"


def test_an_example_that_the_arm_cannot_show_is_told(run):
    code, metrics, err, _ = run("llama", "--shots", "2", "--shots-from", "train.json", "--context", "answer-removed")
    assert code == 2 and "can be built for none" in err, "no test question has a second sentence"
    code, metrics, err, _ = run("llama", "--shots", "2", "--shots-from", "train.json", "--context", "same-article")
    assert code == 0 and metrics["shots_ids"] == ["Arn3"]
    assert "--shots: Bex1 is not shown: no other paragraph of the article is without the answer" in err


def test_no_example_is_of_an_article_that_is_tested():
    train = parse_squad(squad(MILLS | {"Eck": [("Gil ran the mill.", "Who ran it?", "Gil")]}), "train")
    another_case = squad({"BEX": ASKED["Dun"]})
    same_passage = squad({"Else": [("Ed drew the mill of Col.", "Of where?", "Col")]})
    for tested, left in ((another_case, ["Arn3", "Col5"]), (same_passage, ["Arn3", "Bex1"])):
        drawn = draw_shots(train, parse_squad(tested, "test"), 2)
        assert [example.id for example in drawn] == left
    with pytest.raises(UserError, match="--shots is 4, but the training file has examples of 3 articles"):
        draw_shots(train, parse_squad(another_case, "test"), 4)


def test_a_seed_draws_and_fewer_are_the_first_of_more():
    many = {f"T{i:02}": [(f"Ada{i} built mill {i}.", "Who?", f"Ada{i}")] for i in range(30)}
    train, test = parse_squad(squad(many), "train"), parse_squad(squad(ASKED), "test")
    drawn = {seed: [e.title for e in draw_shots(train, test, 4, seed)] for seed in (None, *range(40))}
    assert drawn[None] == ["T00", "T01", "T02", "T03"]
    assert all([e.title for e in draw_shots(train, test, 2, seed)] == titles[:2] for seed, titles in drawn.items())
    assert len({tuple(titles) for titles in drawn.values()}) > 38
    assert len({title for titles in drawn.values() for title in titles}) == 30, "all articles are drawn from"


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("t5", ["--shots", "1", "--shots-from", "train.json"], "is a T5, which reads one question"),
        ("llama", ["--shots", "1"], "--shots-from TRAIN.json"),
        ("llama", ["--shots", "-1"], "--shots is -1, expected 0 or more"),
        ("llama", ["--shots-from", "train.json"], "say how many with --shots"),
        ("llama", ["--shots", "9", "--shots-from", "train.json"], "examples of 3 articles"),
    ],
)
def test_a_mistake_is_one_line(run, model, options, message):
    code, _, err, asked = run(model, *options)
    assert code == 2 and message in err.splitlines()[-1] and not asked
