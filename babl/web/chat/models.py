"""The tables. A conversation is a tree of messages, which never change: edits and new answers are siblings.

All keys are UUIDs that sort by time, so that exports keep them and lists are in order.
"""

import os
import threading
import time
import uuid
from typing import ClassVar

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.utils import timezone

_lock = threading.Lock()
_last = 0


def uuid7() -> uuid.UUID:
    """Returns a new UUID, greater than all that this process has made before. Ref: RFC 9562, sections 5.7 and 6.2."""
    global _last
    with _lock:
        _last = max(time.time_ns() * 4096 // 1_000_000, _last + 1)  # milliseconds, and 12 bits of their fraction
        moment = _last
    drawn = int.from_bytes(os.urandom(8), "big") >> 2
    return uuid.UUID(int=moment >> 12 << 80 | 0x7 << 76 | (moment & 0xFFF) << 64 | 0x2 << 62 | drawn)


class Passage(models.Model):
    """A text that questions are about, stored once for each owner."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, related_name="passages")
    sha256 = models.CharField(max_length=64)
    title = models.CharField(max_length=200)
    text = models.TextField()
    created = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["owner", "sha256"], name="passage_once")]


class Conversation(models.Model):
    """A tree of messages, and the settings of the next question."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, related_name="conversations")
    title = models.CharField(max_length=200, blank=True)
    system_prompt = models.TextField(blank=True)
    model = models.CharField(max_length=200, blank=True)
    settings = models.JSONField(default=dict, blank=True)  # of sampling; the engine's defaults where absent
    passage = models.ForeignKey(Passage, models.SET_NULL, null=True, blank=True, related_name="+")
    leaf = models.ForeignKey(
        "Message", models.SET_NULL, null=True, blank=True, related_name="+"
    )  # end of the branch shown
    archived = models.DateTimeField(null=True, blank=True)
    deleted = models.DateTimeField(null=True, blank=True)  # in the trash since
    created = models.DateTimeField(default=timezone.now)
    updated = models.DateTimeField(default=timezone.now)

    class Meta:
        indexes: ClassVar = [models.Index(fields=["owner", "-updated", "-id"], name="conversation_list")]


class Message(models.Model):
    """A question, or an answer; one that is still being written has what was saved so far."""

    class Role(models.TextChoices):
        """Who wrote it."""

        USER = "user"
        ASSISTANT = "assistant"

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    conversation = models.ForeignKey(Conversation, models.CASCADE, related_name="messages")
    parent = models.ForeignKey("self", models.CASCADE, null=True, blank=True, related_name="children")
    role = models.CharField(max_length=9, choices=Role.choices)
    content = models.TextField(blank=True)
    client_id = models.UUIDField(null=True, blank=True)  # of the request, so that one sent twice is stored once
    passage = models.ForeignKey(Passage, models.PROTECT, null=True, blank=True, related_name="questions")
    golds = models.JSONField(null=True, blank=True)  # right answers of a question; [] if it has none, None if unknown
    created = models.DateTimeField(default=timezone.now)

    class Meta:
        indexes: ClassVar = [models.Index(fields=["conversation", "parent"], name="message_children")]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["conversation", "client_id"], name="message_once"),
            models.CheckConstraint(condition=Q(role="user") | Q(parent__isnull=False), name="answer_has_question"),
        ]


class Status(models.TextChoices):
    """The status of an answer, or of a run of a question set."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"  # by the user
    INTERRUPTED = "interrupted"  # by a crash or the end of the server
    ERROR = "error"


LIVE = (Status.QUEUED, Status.RUNNING)


class Generation(models.Model):
    """How an answer was generated: the request to the engine, and the engine's figures."""

    class Kind(models.TextChoices):
        """The kind of request."""

        CHAT = "chat"
        QA = "qa"
        COMPLETION = "completion"

    message = models.OneToOneField(Message, models.CASCADE, primary_key=True, related_name="generation")
    kind = models.CharField(max_length=10, choices=Kind.choices)
    model = models.CharField(max_length=200)
    with_context = models.BooleanField(default=True)
    comparison = models.UUIDField(null=True, blank=True)  # shared by answers that stand side by side
    settings = models.JSONField(default=dict, blank=True)
    status = models.CharField(max_length=11, choices=Status.choices, default=Status.QUEUED)
    finish = models.CharField(max_length=10, blank=True)
    error = models.CharField(max_length=10, blank=True)  # code
    error_message = models.TextField(blank=True)
    prompt_tokens = models.IntegerField(null=True, blank=True)
    cut_tokens = models.IntegerField(null=True, blank=True)
    windows = models.IntegerField(null=True, blank=True)
    tokens = models.IntegerField(null=True, blank=True)
    log_prob = models.FloatField(null=True, blank=True)
    probability = models.FloatField(null=True, blank=True)
    span_start = models.IntegerField(null=True, blank=True)  # code points of the passage
    span_end = models.IntegerField(null=True, blank=True)
    first_seconds = models.FloatField(null=True, blank=True)  # from the request to the first text
    seconds = models.FloatField(null=True, blank=True)  # of computing
    weights = models.CharField(max_length=64, blank=True)
    tokenizer = models.CharField(max_length=64, blank=True)
    finished = models.DateTimeField(null=True, blank=True)

    class Meta:
        indexes: ClassVar = [
            models.Index(fields=["status"], name="generation_live", condition=Q(status__in=("queued", "running")))
        ]


GENERATION_COLUMNS = [field.name for field in Generation._meta.fields if not field.primary_key]


class Feedback(models.Model):
    """The user's feedback on an answer, and the right answer."""

    message = models.OneToOneField(Message, models.CASCADE, primary_key=True, related_name="feedback")
    good = models.BooleanField()
    right_start = models.IntegerField(null=True, blank=True)  # code points of the passage
    right_end = models.IntegerField(null=True, blank=True)
    no_answer = models.BooleanField(default=False)  # the right answer is that the passage has none
    note = models.TextField(blank=True)
    updated = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints: ClassVar = [
            models.CheckConstraint(
                condition=Q(right_start__isnull=True, right_end__isnull=True)
                | Q(right_start__gte=0, right_end__gt=models.F("right_start"), no_answer=False),
                name="right_span",
            )
        ]


class QuestionSet(models.Model):
    """The questions of a SQuAD file."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, related_name="question_sets")
    name = models.CharField(max_length=200)
    sha256 = models.CharField(max_length=64)  # of the file, which is imported once
    created = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["owner", "sha256"], name="question_set_once")]


class Question(models.Model):
    """One question of a set."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    set = models.ForeignKey(QuestionSet, models.CASCADE, related_name="questions")
    position = models.IntegerField()
    qid = models.CharField(max_length=200)
    title = models.CharField(max_length=200)
    text = models.TextField()
    passage = models.ForeignKey(Passage, models.PROTECT, related_name="+")
    answers = models.JSONField()  # SQuAD's, none for a question without an answer

    class Meta:
        ordering: ClassVar = ["position"]
        constraints: ClassVar = [models.UniqueConstraint(fields=["set", "qid"], name="question_once")]


class Run(models.Model):
    """A model's pass through a question set."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    set = models.ForeignKey(QuestionSet, models.CASCADE, related_name="runs")
    model = models.CharField(max_length=200)
    with_context = models.BooleanField(default=True)
    status = models.CharField(max_length=11, choices=Status.choices, default=Status.QUEUED)
    error_message = models.TextField(blank=True)
    weights = models.CharField(max_length=64, blank=True)
    created = models.DateTimeField(default=timezone.now)


class RunAnswer(models.Model):
    """The answer to one question in a run, with the official script's scores, in [0, 1].

    A question that does not fit the model counts as answered with nothing, as in `babl evaluate`; `skipped` says why.
    """

    run = models.ForeignKey(Run, models.CASCADE, related_name="answers")
    question = models.ForeignKey(Question, models.CASCADE, related_name="+")
    text = models.TextField(blank=True)
    exact = models.FloatField()
    f1 = models.FloatField()
    probability = models.FloatField(null=True, blank=True)
    skipped = models.TextField(blank=True)

    class Meta:
        constraints: ClassVar = [models.UniqueConstraint(fields=["run", "question"], name="answer_once")]


class ApiKey(models.Model):
    """A key for the API under /v1; only its hash is stored."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, related_name="api_keys")
    name = models.CharField(max_length=100)
    prefix = models.CharField(max_length=12)
    sha256 = models.CharField(max_length=64, unique=True)
    created = models.DateTimeField(default=timezone.now)
    revoked = models.DateTimeField(null=True, blank=True)
