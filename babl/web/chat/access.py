"""Who comes in, and how often: the one-time link, API keys, rate limits."""

import secrets
import time
from collections.abc import Hashable
from typing import Any

from django.conf import settings

from babl.web.chat.models import ApiKey
from babl.web.chat.services import key_hash


class Link:
    """The link that lets the user of a server without login in, once; using it makes the next one."""

    def __init__(self) -> None:
        self._token = secrets.token_urlsafe(24)
        self.address = ""  # of the server, set when it listens

    def __str__(self) -> str:
        return f"{self.address}/login/?token={self._token}"

    def use(self, token: str) -> bool:
        """Returns whether the token is this link's; it is then spent."""
        right = secrets.compare_digest(token.encode(), self._token.encode())
        if right:
            self._token = secrets.token_urlsafe(24)
        return right


link = Link()


def key_owner(header: str) -> Any | None:
    """Returns the user whose key an Authorization header bears, or None."""
    scheme, _, key = header.partition(" ")
    if scheme.lower() != "bearer" or not key:
        return None
    row = ApiKey.objects.select_related("owner").filter(sha256=key_hash(key.strip()), revoked__isnull=True).first()
    return row.owner if row and row.owner.is_active else None


class Limiter:
    """A bucket of tokens for each key, which fills evenly."""

    def __init__(self, per_minute: int):
        self._per_second, self._most = per_minute / 60, float(per_minute)
        self._buckets: dict[Hashable, tuple[float, float]] = {}  # key -> tokens at a time

    def wait(self, key: Hashable) -> float:
        """Returns 0 and takes a token, or returns the seconds until there is one."""
        now = time.monotonic()
        if len(self._buckets) > 10_000:
            self._buckets = {k: b for k, b in self._buckets.items() if self._filled(b, now) < self._most}
        tokens = self._filled(self._buckets.get(key, (self._most, now)), now)
        if tokens < 1:
            return (1 - tokens) / self._per_second
        self._buckets[key] = (tokens - 1, now)
        return 0.0

    def _filled(self, bucket: tuple[float, float], now: float) -> float:
        return min(self._most, bucket[0] + (now - bucket[1]) * self._per_second)


questions = Limiter(settings.QUESTIONS_PER_MINUTE)
logins = Limiter(settings.LOGINS_PER_MINUTE)
