"""Users and their API keys: every write. Each function is one transaction on the writer's thread (`database.write`)."""

import hashlib
import secrets
from typing import Any
from uuid import UUID

from django.contrib.auth import get_user_model
from django.db import transaction
from django.db.models import Model
from django.utils import timezone

from babl.errors import UserError
from babl.web.chat import selectors
from babl.web.chat.models import ApiKey, Conversation, QuestionSet
from babl.web.chat.services import checked_text, purge

LOCAL_USER = "local"  # of a server without login


@transaction.atomic
def create_api_key(user: Any, name: str) -> tuple[ApiKey, str]:
    """Creates an API key; returns its row, and the key itself, which is stored nowhere."""
    key = f"babl-{secrets.token_urlsafe(32)}"
    row = ApiKey.objects.create(
        owner=user, name=checked_text("name", name, 100, least=1), prefix=key[:12], sha256=key_hash(key)
    )
    return row, key


def key_hash(key: str) -> str:
    """Returns the hash that is stored of an API key; keys are long and random, so they need no salt."""
    return hashlib.sha256(key.encode()).hexdigest()


@transaction.atomic
def revoke_api_key(user: Any, id: UUID) -> None:
    """Revokes the user's key."""
    key = ApiKey.objects.get(owner=user, id=id)
    key.revoked = key.revoked or timezone.now()
    key.save(update_fields=["revoked"])


@transaction.atomic
def set_password(name: str, password: str) -> None:
    """Sets the password of a user, who is created if need be; revokes the API keys and ends the sessions of before."""
    user, _ = get_user_model().objects.get_or_create(username=name)
    user.set_password(password)  # which ends the sessions of before
    user.save()
    selectors.api_keys(user).update(revoked=timezone.now())


@transaction.atomic
def remove_user(name: str) -> int:
    """Deletes a user and everything of theirs; returns the number of conversations.

    Raises:
        UserError: There is no such user.
    """
    user = get_user_model().objects.filter(username=name).first()
    if user is None:
        raise UserError(f"there is no user {name!r}")
    conversations = list(Conversation.objects.filter(owner=user))
    purge(conversations)  # messages and questions keep the passages that they are about
    QuestionSet.objects.filter(owner=user).delete()
    user.delete()
    return len(conversations)


@transaction.atomic
def local_user() -> Model:
    """Returns the only user of a server without login, who is created if need be."""
    user, new = get_user_model().objects.get_or_create(username=LOCAL_USER)
    if new:
        user.set_unusable_password()
        user.save()
    return user
