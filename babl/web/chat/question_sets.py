"""Question sets and their runs: every write. Each function is one transaction on the writer's thread."""

import hashlib
from collections.abc import Iterable
from typing import Any
from uuid import UUID

import msgspec
from django.db import transaction

from babl.data.squad import parse_squad
from babl.errors import UserError
from babl.web.chat import selectors, services
from babl.web.chat.models import LIVE, Passage, Question, QuestionSet, Run, RunAnswer, Status


@transaction.atomic
def import_question_set(user: Any, name: str, data: bytes) -> QuestionSet:
    """Imports a SQuAD file as a question set; returns the existing set if the same file was imported before.

    Raises:
        UserError: The file is not SQuAD's, or a passage is too long.
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


@transaction.atomic
def create_run(user: Any, set_id: UUID, model: str, with_context: bool) -> Run:
    """Creates a run, queued, through the user's question set."""
    question_set = selectors.question_set(user, set_id)
    model = services.checked_text("model", model, 200, least=1)
    return Run.objects.create(set=question_set, model=model, with_context=with_context)


@transaction.atomic
def resume_run(user: Any, id: UUID) -> Run:
    """Queues a run again for the questions that it has not answered.

    Raises:
        Conflict: It is running, or done.
    """
    run = selectors.run(user, id)
    if run.status in (*LIVE, Status.DONE):
        raise services.Conflict(f"the run is {run.status}")
    run.status, run.error_message = Status.QUEUED, ""
    run.save(update_fields=["status", "error_message"])
    return run


@transaction.atomic
def update_run(id: UUID, status: str, answers: Iterable[RunAnswer] = (), **facts: Any) -> None:
    """Sets a run's status and other columns, and stores further answers."""
    RunAnswer.objects.bulk_create(answers, ignore_conflicts=True)
    Run.objects.filter(id=id).update(status=status, **facts)


@transaction.atomic
def stop_run(id: UUID) -> None:
    """Marks a run as stopped, unless it has ended."""
    Run.objects.filter(id=id, status__in=LIVE).update(status=Status.STOPPED)


@transaction.atomic
def delete_question_set(user: Any, id: UUID) -> None:
    """Deletes a set with its runs, and the passages that nothing else uses."""
    gone = selectors.question_set(user, id)
    passages = set(gone.questions.values_list("passage_id", flat=True))
    gone.delete()
    services.delete_unused(passages)
