"""Access control: the one-time login link, API keys, and rate limits."""

import secrets
import time
from collections import OrderedDict
from hashlib import sha256
from typing import Any

from django.conf import settings

from babl.web.chat.accounts import key_hash
from babl.web.chat.models import ApiKey

MAX_BUCKETS = 10_000  # of a limiter


class Link:
    """The one-time link that logs in the user of a server without login; using it makes a new one."""

    def __init__(self) -> None:
        self._token = secrets.token_urlsafe(24)
        self.address = ""  # of the server, set when it listens

    def __str__(self) -> str:
        return f"{self.address}/login/?token={self._token}"

    def use(self, token: str) -> bool:
        """Returns whether the token is valid, and replaces it if so."""
        right = secrets.compare_digest(token.encode(), self._token.encode())
        if right:
            self._token = secrets.token_urlsafe(24)
        return right


link = Link()


def key_owner(header: str) -> Any | None:
    """Returns the owner of the API key in an Authorization header, or None."""
    scheme, _, key = header.partition(" ")
    if scheme.lower() != "bearer" or not key:
        return None
    row = ApiKey.objects.select_related("owner").filter(sha256=key_hash(key.strip()), revoked__isnull=True).first()
    return row.owner if row and row.owner.is_active else None


class Limiter:
    """A token-bucket rate limiter with a bucket for each key; the `MAX_BUCKETS` used last are kept.

    Args:
        per_minute: Tokens that a bucket holds, and is refilled with in a minute; None for no limit.
    """

    def __init__(self, per_minute: int | None):
        self._per_second, self._most = (per_minute or 0) / 60, float(per_minute or 0)
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()  # hash of a key -> tokens, and when

    def wait(self, key: str) -> float:
        """Takes a token and returns 0, or returns the seconds until there is one."""
        if not self._most:
            return 0.0
        now, hashed = time.monotonic(), sha256(key.encode(errors="surrogatepass")).digest()
        before, since = self._buckets.get(hashed, (self._most, now))
        tokens = min(self._most, before + (now - since) * self._per_second)
        if tokens < 1:
            return (1 - tokens) / self._per_second
        self._buckets[hashed] = (tokens - 1, now)
        self._buckets.move_to_end(hashed)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return 0.0


questions = Limiter(settings.QUESTIONS_PER_MINUTE)
addresses = Limiter(settings.LOGINS_PER_MINUTE)
names = Limiter(10 * settings.LOGINS_PER_MINUTE)  # more than an address, so that one address cannot lock out a name


def wait_to_log_in(name: str, address: str) -> float:
    """Counts an attempt to log in and returns 0, or returns the seconds until the next one is allowed.

    The address is checked first: attempts that it refuses do not count for the name.
    """
    return addresses.wait(address) or names.wait(name)
