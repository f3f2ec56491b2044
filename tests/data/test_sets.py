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


def test_an_arm_that_no_question_has_is_an_error(train_file):
    cfg = DataConfig(str(train_file), context="random")
    train, _ = load_sets(cfg, 0)
    one_article = [e for e in train if e.title == train[0].title]
    with pytest.raises(
        UserError, match='"random", which can be built for no question: no paragraph of another article'
    ):
        load_views(cfg, one_article)
