import pytest

from babl.data.kinds import answer_kind, question_kind


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("Who founded it?", "who"),
        ("To whom does the coat belong?", "who"),
        ("In which year did it end?", "which"),
        ("About how many people live there?", "how many"),
        ("How much did it cost?", "how many"),
        ("How does it work?", "how"),
        ("The capital is called what?", "what"),
        ("Name the capital.", "other"),
        ("Is somewhere a whole?", "other"),
    ],
)
def test_a_question_is_of_the_kind_of_its_first_question_word(question, kind):
    assert question_kind(question) == kind


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("1969", "year"),
        ("1990s", "year"),
        ("July 20, 1969", "date"),
        ("February", "date"),
        ("19th century", "date"),
        ("$5 million", "money"),
        ("seven", "number"),
        ("50%", "number"),
        ("Neil Armstrong", "person"),
        ("Paris", "name"),
        ("the University of Oxford", "phrase"),
        ("University of Oxford", "name"),
        ("red coat", "phrase"),
        ("because they may freeze in the long winter", "clause"),
    ],
)
def test_an_answer_is_of_the_kind_its_characters_show(answer, kind):
    assert answer_kind(answer) == kind
