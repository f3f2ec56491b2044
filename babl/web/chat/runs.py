"""Runs of question sets that are in progress: a task for each asks the questions and stores the answers."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any
from uuid import UUID

from asgiref.sync import sync_to_async
from django.db import DatabaseError, connections

from babl.web.chat import question_sets, selectors
from babl.web.chat.database import write
from babl.web.chat.hub import RETRY_SECONDS, hub
from babl.web.chat.metrics import UNSAVED
from babl.web.chat.models import Question, Run, RunAnswer, Status
from babl.web.chat.serializers import score
from babl.web.engine.protocol import Done, Failed, QARequest, Request, Settings

TOO_LONG = "prompt"  # the failure of a question that does not fit its model
BATCH = 8  # questions that are asked at once
log = logging.getLogger("babl.web")
_tasks: dict[UUID, asyncio.Task] = {}


async def start(service: Callable[..., Run], *args: Any) -> Run:
    """Calls a service that stores a run of a question set, and starts it."""

    async def store_and_start() -> Run:
        run = await write(service, *args)
        task = _tasks[run.id] = hub.spawn(_answer_all(run))
        task.add_done_callback(lambda _: _tasks.pop(run.id, None))
        return run

    return await hub.detached(store_and_start())


async def stop(id: UUID) -> None:
    """Stops a run, unless it has ended."""
    if task := _tasks.get(id):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await write(question_sets.stop_run, id)


async def _answer_all(run: Run) -> None:
    try:
        await _answer_questions(run)
    except Exception:  # a bug must not leave a run that never ends
        log.exception("a run of a question set broke off")
        await _interrupt(run)


async def _interrupt(run: Run) -> None:
    """Marks a run as interrupted, and retries until that succeeds; the disk may be full."""
    while True:
        try:
            await write(question_sets.update_run, run.id, Status.INTERRUPTED)
            return
        except DatabaseError as error:
            UNSAVED.inc()
            log.error("the end of a run could not be stored (%s); trying again", type(error).__name__)
            await asyncio.sleep(RETRY_SECONDS)


async def _answer_questions(run: Run) -> None:
    """Asks the questions without an answer, a few at once, and stores the answers."""
    questions, user = await sync_to_async(_remaining, thread_sensitive=False)(run)
    await write(question_sets.update_run, run.id, Status.RUNNING)
    for at in range(0, len(questions), BATCH):
        part = questions[at : at + BATCH]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_answer_one(run, question, user)) for question in part]
        ends = [task.result() for task in tasks]
        answers = [
            answer
            for question, end in zip(part, ends, strict=True)
            if (answer := _run_answer(run, question, end)) is not None
        ]
        weights = next((end.weights for end in ends if isinstance(end, Done)), run.weights)
        failed = next((end for end in ends if isinstance(end, Failed) and end.code != TOO_LONG), None)
        if failed is not None:
            facts = {"weights": weights, "error_message": failed.message}
            await write(question_sets.update_run, run.id, Status.ERROR, answers, **facts)
            return
        await write(question_sets.update_run, run.id, Status.RUNNING, answers, weights=weights)
    await write(question_sets.update_run, run.id, Status.DONE)


async def _answer_one(run: Run, question: Question, user: str) -> Done | Failed:
    context = question.passage.text if run.with_context else None
    id = f"{run.id}/{question.id}"
    request = QARequest(id, run.model, question.text, context, Settings(max_new_tokens=64), user)
    while True:
        end = await _last_event(request)
        if not (isinstance(end, Failed) and end.code == "busy"):
            return end
        await asyncio.sleep(end.retry_after or RETRY_SECONDS)


async def _last_event(request: Request) -> Done | Failed:
    """Submits a request that nobody streams; returns its last event."""
    end: Done | Failed = Failed(request.id, "engine", "the engine gave no answer")
    async with contextlib.aclosing(hub.engine.submit(request)) as events:
        async for event in events:
            if isinstance(event, Done | Failed):
                end = event
    return end


def _remaining(run: Run) -> tuple[list[Question], str]:
    try:
        return selectors.unanswered(run), str(run.set.owner_id)
    finally:
        connections.close_all()


def _run_answer(run: Run, question: Question, end: Done | Failed) -> RunAnswer | None:
    """Returns the row of an answer; None if it broke off, to be asked again when the run is resumed."""
    if isinstance(end, Failed) and end.code != TOO_LONG:
        return None
    text, probability, skipped = (end.text, end.probability, "") if isinstance(end, Done) else ("", None, end.message)
    scores = score(text, [answer["text"] for answer in question.answers])
    scores = {name: value / 100 for name, value in scores.items()}
    return RunAnswer(run=run, question=question, text=text, probability=probability, skipped=skipped, **scores)
