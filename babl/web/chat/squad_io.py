"""SQuAD files in (question sets) and out (what users said was right)."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from django.db import transaction

from babl.data.squad import Answer, Example, parse_squad
from babl.errors import UserError
from babl.web.chat import services
from babl.web.chat.models import Feedback, Passage, Question, QuestionSet


@transaction.atomic
def import_question_set(user: Any, name: str, data: bytes) -> QuestionSet:
    """Returns the question set of a SQuAD file, the one that is there already where the same file came before.

    Raises:
        UserError: It is no SQuAD file, or a passage is too long.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    there = QuestionSet.objects.filter(owner=user, sha256=sha256).first()
    if there:
        return there
    try:
        tree = msgspec.json.decode(services.without_nul(data))
    except (msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"{name}: malformed JSON ({error})") from None
    examples = parse_squad(tree, name)
    new = QuestionSet.objects.create(owner=user, name=name[:200], sha256=sha256)
    passages: dict[str, Passage] = {}
    for example in examples:
        if example.context not in passages:
            passages[example.context] = services.add_passage(user, example.context, example.title[:200])
    Question.objects.bulk_create(
        Question(
            set=new,
            position=position,
            qid=example.id[:200],
            title=example.title[:200],
            text=example.question,
            passage=passages[example.context],
            answers=[{"text": answer.text, "answer_start": answer.start} for answer in example.answers],
        )
        for position, example in enumerate(examples)
    )
    return new


@dataclass(frozen=True)
class Corrections:
    """What feedback makes right, and how much of it does not tell.

    Attributes:
        train: Of passages that no test question is about.
        test: Of the other passages.
        undecided: Judgements that name no right answer.
    """

    train: list[Example]
    test: list[Example]
    undecided: int


def corrections(given: Iterable[Feedback], test_share: float = 0.0) -> Corrections:
    """Returns what users said was right, one example for each question about a passage, the last word counting.

    Args:
        given: The oldest first.
        test_share: In [0, 1): of the passages, by a hash of their text, so that a passage keeps its side for ever.

    Raises:
        UserError: The share is outside.
    """
    if not 0 <= test_share < 1:
        raise UserError(f"--test-share is {test_share}, expected at least 0 and less than 1")
    found: dict[tuple[str, str], Example] = {}
    undecided = 0
    for each in given:
        example = corrected(each)
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


def corrected(given: Feedback) -> Example | None:
    """Returns the question with the answer that the feedback makes right, or None where it does not tell which is."""
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
