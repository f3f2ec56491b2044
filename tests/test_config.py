from dataclasses import dataclass, field

import pytest

from babl.config import load_config, save_config
from babl.errors import UserError
from babl.scripts.train import TrainConfig


def load(tmp_path, text, *overrides):
    (tmp_path / "c.toml").write_text(text)
    return load_config(TrainConfig, tmp_path / "c.toml", overrides)


def test_overrides_win_over_the_file_which_wins_over_defaults(tmp_path):
    config = load(tmp_path, "[optim]\nlr = 0.5\nwarmup_steps = 7\n", "optim.lr=2", "run.name=my run", "run.resume=true")
    assert (config.optim.lr, config.optim.warmup_steps, config.optim.weight_decay) == (2.0, 7, 0.0)
    assert (config.run.name, config.run.resume) == ("my run", True)


@pytest.mark.parametrize("text", ["2026-08-08", "42", "true", "1e5", "[1]", "a b", "ü/1", "12:30:00"])
def test_a_name_is_text_whatever_it_looks_like(tmp_path, text):
    config = load(tmp_path, "", f"run.name={text}", f"model.path={text}")
    assert config.run.name == config.model.path == text
    assert load(tmp_path, "", f'run.name="{text}"').run.name == text, "as TOML writes it"


def test_further_dots_lead_into_a_table(tmp_path):
    config = load(
        tmp_path, "[model]\nshape = { d_model = 8, d_ff = 9 }\n", "model.shape.d_model=16", "model.shape.d_kv=4"
    )
    assert config.model.shape == {"d_model": 16, "d_ff": 9, "d_kv": 4}
    assert load(tmp_path, "", "model.shape.d_model=16").model.shape == {"d_model": 16}


def test_a_saved_configuration_loads_as_it_was(tmp_path):
    config = load(tmp_path, "", "model.shape={d_model=8}")
    save_config(config, tmp_path / "run.toml")
    assert load_config(TrainConfig, tmp_path / "run.toml") == config


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("[optim]\nlrr = 1.0", None, r"unknown key 'optim\.lrr'; did you mean 'lr'\?"),
        ("[optimm]\nlr = 1.0", None, r"unknown section 'optimm'; did you mean 'optim'\?"),
        ("[train]\nsteps = 'many'", None, r'train\.steps is "many", expected int'),
        ("[train]\nsteps = true", None, r"train\.steps is true, expected int"),
        ("", "train.steps=1.5", r"train\.steps is 1\.5, expected int"),
        ("", "train.steps=0", r"train\.steps is 0, expected at least 1"),
        ("", "optim.name=adam", r'optim\.name is "adam", expected one of adamw, adafactor; did you mean'),
        ("", "train.precision=fp16", r'"fp16", which overflows in T5'),
        ("", "optim.lr=inf", r"optim\.lr is inf, expected a finite number"),
        ("[optim]\nlr = nan", None, r"optim\.lr is nan, expected a finite number"),
        ("", "optim.max_grad_norm=-inf", r"optim\.max_grad_norm is -inf, expected a finite number"),
        ("", "optim.lr=-1e-9", r"optim\.lr is -1e-09, expected at least 0"),
        ("", "optim.weight_decay=-1", r"optim\.weight_decay is -1\.0, expected at least 0"),
        ("", "optim.warmup_steps=-3", r"optim\.warmup_steps is -3, expected at least 0"),
        ("", "optim.label_smoothing=2", r"optim\.label_smoothing is 2\.0, expected less than 1"),
        ("", "optim.label_smoothing=-0.1", r"optim\.label_smoothing is -0\.1, expected at least 0"),
        ("", "train.save_every=-5", r"train\.save_every is -5, expected at least 0"),
        ("", "train.validate_every=-1", r"train\.validate_every is -1, expected at least 0"),
        ("", "train.keep_last=-1", r"train\.keep_last is -1, expected at least 0"),
        ("", "train.keep_every=-1", r"train\.keep_every is -1, expected at least 0"),
        ("", "batch.tokens=0", r"batch\.tokens is 0, expected at least 1"),
        ("", "batch.accumulation=0", r"batch\.accumulation is 0, expected at least 1"),
        ("", "batch.examples=-1", r"batch\.examples is -1, expected at least 0"),
        ("", "data.max_source_tokens=0", r"data\.max_source_tokens is 0, expected at least 1"),
        ("", "data.stride=-1", r"data\.stride is -1, expected at least 0"),
        ("", "run.seed=99999999999999999999", r"run\.seed is 99999999999999999999, expected less than 4294967296"),
        ("", "run.seed=-1", r"run\.seed is -1, expected at least 0"),
        ("", "run.name=", r'run\.name is "", expected at least 1 character'),
        ("", "optim.lr.factor=3", r"optim\.lr is \{.*\}, expected float"),
        ("[optim]\nlr = 1.0", "optim.lr.factor=3", r"optim\.lr is not a section"),
        ("", "model..shape=3", r"unknown key 'model\.'"),
        ("", "steps=3", r"'steps=3': expected section\.key=value"),
        ("[train", None, r"c\.toml: "),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path, text, override, message):
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, text, *([override] if override else []))
    assert "\n" not in str(error.value)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no\.toml: no such configuration file"):
        load_config(TrainConfig, tmp_path / "no.toml")


@dataclass
class Listed:
    names: list[str] = field(default_factory=list)
    pairs: list[list[int]] = field(default_factory=list)


@dataclass
class WithLists:
    all: Listed = field(default_factory=Listed)


def test_every_item_of_a_list_is_checked(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[all]\nnames = ["a"]\npairs = [[1, 2]]\n')
    assert load_config(WithLists, path).all == Listed(["a"], [[1, 2]])
    with pytest.raises(UserError, match=r"all\.names\[1\] is 2, expected str"):
        load_config(WithLists, path, ['all.names=["a", 2]'])
    with pytest.raises(UserError, match=r"all\.pairs\[0\] is 1, expected list"):
        load_config(WithLists, path, ["all.pairs=[1]"])
