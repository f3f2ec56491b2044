import json

import pytest

from babl.data.fictional import fictional_corpus
from babl.data.sets import DataConfig, load_sets, load_views
from babl.errors import UserError


@pytest.fixture
def train_file(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(fictional_corpus(8, 1)[0]), encoding="utf-8")
    return path


def test_a_held_out_slice_shares_no_article_with_the_rest(train_file):
    train, validation = load_sets(DataConfig(str(train_file)), 0)
    assert not {e.title for e in train} & {e.title for e in validation}


def test_a_validation_file_of_the_same_articles_is_refused(train_file):
    with pytest.raises(UserError, match="shares 8 articles"):
        load_sets(DataConfig(str(train_file), str(train_file)), 0)


def test_excluded_questions_are_not_shown_and_change_no_other(train_file, tmp_path):
    cfg = DataConfig(str(train_file), context="random")
    train, _ = load_sets(cfg, 0)
    whole = load_views(cfg, train)
    exclude = tmp_path / "exclude.txt"
    exclude.write_text(f"{train[0].id}\n{train[5].id}\n", encoding="utf-8")
    cfg.exclude = str(exclude)
    assert load_views(cfg, train) == [*whole[1:5], *whole[6:]]
    exclude.write_text("\n".join(e.id for e in train), encoding="utf-8")
    with pytest.raises(UserError, match=f'"random", which leaves none of {len(train)} questions'):
        load_views(cfg, train)
    cfg.exclude = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"data\.exclude: .*nowhere cannot be read"):
        load_views(cfg, train)
