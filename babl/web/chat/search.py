"""Full-text search in the user's conversations, by SQLite's FTS5 or PostgreSQL's."""

import re
import unicodedata
from collections.abc import Sequence
from itertools import islice
from typing import Any
from uuid import UUID

from django.contrib.postgres.search import SearchQuery, SearchVector
from django.db import connection
from django.db.models import QuerySet

from babl.errors import UserError
from babl.web.chat.models import Conversation, Message
from babl.web.chat.selectors import CONVERSATIONS_PER_PAGE
from babl.web.chat.serializers import conversation_json

MAX_WORDS = 32  # of a search
EXCERPT_CHARACTERS = 60  # to each side of what was searched for


def search(user: Any, query: str, limit: int = CONVERSATIONS_PER_PAGE) -> list[dict[str, Any]]:
    """Returns the user's conversations that have every word, or its beginning, in their title or in one message.

    Each is a `conversation_json` with `message` (the newest match, None for the title) and an `excerpt` around it.
    """
    words = re.findall(r"\w+", query)
    if not words:
        return []
    if len(words) > MAX_WORDS:
        raise UserError(f"the search has {len(words)} words, expected at most {MAX_WORDS}")
    mine = Conversation.objects.filter(owner=user, deleted__isnull=True)
    folded = [_fold(word) for word in words]
    titles = mine.order_by("-updated").values_list("id", "title").iterator()  # SQLite folds the case of ASCII alone
    in_title = (id for id, title in titles if all(word in _fold(title) for word in folded))
    ids = list(islice(in_title, limit))
    hits = mine.in_bulk(ids)
    found: dict[UUID, dict[str, Any]] = {
        id: conversation_json(hits[id]) | {"message": None, "excerpt": hits[id].title} for id in ids
    }
    for hit in _matches(user, words).order_by("-created", "-id")[: 4 * limit]:
        there = found.get(hit.conversation_id)
        facts = {"message": str(hit.id), "excerpt": _excerpt(hit.content, words)}
        if there is None and len(found) < limit:
            found[hit.conversation_id] = conversation_json(hit.conversation) | facts
        elif there is not None and there["message"] is None:
            there |= facts
    return list(found.values())


def _fold(text: str) -> str:
    """Returns the text as it is compared, whatever its case and however its letters are composed."""
    return unicodedata.normalize("NFKC", text).casefold()


def _matches(user: Any, words: Sequence[str]) -> QuerySet[Message]:
    """Returns the user's messages that have each word or a word that begins with it."""
    mine = Message.objects.filter(conversation__owner=user, conversation__deleted__isnull=True)
    mine = mine.select_related("conversation")
    if connection.vendor == "postgresql":
        query = SearchQuery(" & ".join(f"{word}:*" for word in words), config="simple", search_type="raw")
        return mine.annotate(words=SearchVector("content", config="simple")).filter(words=query)
    query = " ".join(f'"{word}"*' for word in words)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT r.message_id FROM chat_search s JOIN chat_search_row r ON r.row = s.rowid"
            " JOIN chat_message m ON m.id = r.message_id JOIN chat_conversation c ON c.id = m.conversation_id"
            " WHERE chat_search MATCH %s AND c.owner_id = %s AND c.deleted IS NULL ORDER BY r.row DESC LIMIT %s",
            [query, user.pk, 4 * CONVERSATIONS_PER_PAGE],
        )
        return mine.filter(id__in=[row[0] for row in cursor.fetchall()])


def _excerpt(text: str, words: Sequence[str]) -> str:
    """Returns the part of a text around the first of the words."""
    at = min((m.start() for word in words if (m := re.search(re.escape(word), text, re.IGNORECASE))), default=0)
    begin, end = max(at - EXCERPT_CHARACTERS, 0), at + EXCERPT_CHARACTERS
    part = " ".join(text[begin:end].split())
    return ("…" if begin else "") + part + ("…" if end < len(text) else "")
