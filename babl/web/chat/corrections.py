"""Users' feedback as SQuAD examples: the answers that they said were right."""

from collections.abc import Iterable
from dataclasses import dataclass

from babl.data.squad import Answer, Example
from babl.errors import UserError
from babl.web.chat.models import Feedback


@dataclass(frozen=True)
class Corrections:
    """Examples made of feedback.

    Attributes:
        train: Of passages that no test example is about.
        test: Of the other passages.
        undecided: Feedback that names no right answer.
    """

    train: list[Example]
    test: list[Example]
    undecided: int


def corrections(given: Iterable[Feedback], test_share: float = 0.0) -> Corrections:
    """Returns the examples, one for each question about a passage; the latest feedback counts.

    Args:
        given: Feedback, the oldest first.
        test_share: In [0, 1): of passages for testing, chosen by a hash of their text, so that a passage never changes
            sides.

    Raises:
        UserError: The share is out of bounds.
    """
    if not 0 <= test_share < 1:
        raise UserError(f"--test-share is {test_share}, expected at least 0 and less than 1")
    found: dict[tuple[str, str], Example] = {}
    undecided = 0
    for each in given:
        example = _example(each)
        if example is None:
            undecided += 1
        else:
            key = (each.message.parent.passage.sha256, " ".join(example.question.split()))
            found.pop(key, None)
            found[key] = example
    sides: tuple[list[Example], list[Example]] = ([], [])
    for (sha256, _), example in found.items():
        sides[int(sha256[:13], 16) < test_share * 16**13].append(example)
    return Corrections(*sides, undecided)


def _example(given: Feedback) -> Example | None:
    """Returns the question with the right answer, or None where the feedback does not name it."""
    question, answer = given.message.parent, given.message
    passage = question.passage
    start, end, none = given.right_start, given.right_end, given.no_answer
    if given.good and start is None and not none:  # the model was right
        start, end = answer.generation.span_start, answer.generation.span_end
        none = not answer.content.strip()
    if start is None and not none:
        return None
    answers = () if none else (Answer(passage.text[start:end], start),)
    title = f"{passage.title} {passage.sha256[:8]}"  # an article of its own, for training splits by article
    return Example(str(question.id), title, question.content, passage.text, answers)
