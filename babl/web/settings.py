"""Django's settings, from the environment that `babl serve` prepares.

BABL_DATA       folder of the database and the secret key; default `BABL_HOME`, else ~/.babl
BABL_MODELS     folders of models, separated by `os.pathsep`; default the engine's own choice
BABL_AUTH       `local` (one user, who logs in by the link that `babl serve` prints) or `login` (names and passwords)
BABL_SCRIPTED   1: answers come from `babl.web.engine.scripted`, not from models; for tests
DATABASE_URL    a database instead of the embedded one: postgres://user@host/name
SECRET_KEY      signs sessions; default one that is created once in the data folder
ALLOWED_HOSTS   host names of the server, separated by commas; default the loopback ones

Behind a proxy that speaks HTTPS, BABL_HTTPS=1 keeps cookies off plain HTTP, BABL_TRUSTED_PROXIES names the addresses
whose X-Forwarded-For is believed, and CSRF_TRUSTED_ORIGINS the origins of the pages, such as https://babl.example.org.
BABL_QUESTIONS_PER_MINUTE limits each user; default 60 with `login`, no limit with `local`.
"""

import hashlib
import ipaddress
import os
import re
import secrets
from pathlib import Path
from typing import Any

import dj_database_url

from babl.errors import UserError

BABL_DATA = Path(os.environ.get("BABL_DATA") or os.environ.get("BABL_HOME") or Path.home() / ".babl")
BABL_MODELS = [Path(each) for each in os.environ.get("BABL_MODELS", "").split(os.pathsep) if each]
BABL_AUTH = os.environ.get("BABL_AUTH", "local")
BABL_SCRIPTED = os.environ.get("BABL_SCRIPTED") == "1"


def _secret_key() -> str:
    """Returns the secret key of this data folder, which is created at the first call.

    Raises:
        UserError: The file does not hold a key.
    """
    file, aside = BABL_DATA / "secret-key", BABL_DATA / f"secret-key.{os.getpid()}"
    BABL_DATA.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not file.exists():
        try:
            with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as new:
                new.write(secrets.token_urlsafe(48))
                new.flush()
                os.fsync(new.fileno())
            aside.rename(file)  # complete, or not at all: the disk may be full
        finally:
            aside.unlink(missing_ok=True)
    key = file.read_bytes()
    if not re.fullmatch(rb"[\w-]{64}", key):
        raise UserError(
            f"{file} has {len(key)} bytes that are not a key, expected 64 letters, digits, - and _; delete it to get"
            " a new one, and everybody has to log in again"
        )
    return key.decode()


def _database(url: str) -> dict[str, Any]:
    """Returns Django's settings of a PostgreSQL database."""
    expected = "expected postgres://USER:PASSWORD@HOST:PORT/NAME"  # the value itself may contain a password
    if not url.startswith(("postgres://", "postgresql://")):
        raise UserError(f"DATABASE_URL begins with {url.partition(':')[0][:20]!r}, {expected}")
    try:
        found = dict(dj_database_url.parse(url, conn_max_age=0))
    except ValueError:
        raise UserError(f"DATABASE_URL cannot be read, {expected}; in a password, @ : / are %40 %3A %2F") from None
    if not found["NAME"]:
        raise UserError(f"DATABASE_URL names no database, {expected}")
    return found


def _questions_per_minute() -> int | None:
    """Returns the questions that a user may ask a minute; None for no limit."""
    text = os.environ.get("BABL_QUESTIONS_PER_MINUTE")
    if not text:
        return None if BABL_AUTH == "local" else 60
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise UserError(f"BABL_QUESTIONS_PER_MINUTE is {text[:40]!r}, expected 1 to 999999999")
    return int(text)


def _trusted_proxies() -> list[str]:
    """Returns the addresses and networks whose X-Forwarded-For is trusted."""
    found = [each.strip() for each in os.environ.get("BABL_TRUSTED_PROXIES", "").split(",") if each.strip()]
    for each in found:
        try:
            ipaddress.ip_network(each, strict=False)
        except ValueError:
            if each != "*":
                raise UserError(
                    f"BABL_TRUSTED_PROXIES has {each[:40]!r}, expected addresses or networks such as 10.0.0.0/8"
                ) from None
    return found


SECRET_KEY = os.environ.get("SECRET_KEY") or _secret_key()
DEBUG = False
LOOPBACK_NAMES = ["127.0.0.1", "localhost", "[::1]"]
ALLOWED_HOSTS = [name for name in os.environ.get("ALLOWED_HOSTS", "").split(",") if name] or LOOPBACK_NAMES

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "babl.web.chat",
]
MIDDLEWARE = [
    "babl.web.middleware.security_headers",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "babl.web.middleware.LoginRequiredMiddleware",
]
ROOT_URLCONF = "babl.web.urls"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.csrf",
                "django.contrib.auth.context_processors.auth",
            ]
        },
    }
]
DATABASES: dict[str, Any] = {}
if os.environ.get("DATABASE_URL"):
    DATABASES["default"] = _database(os.environ["DATABASE_URL"])
    DATABASES["default"]["CONN_HEALTH_CHECKS"] = True  # the database may have been restarted
    DATABASES["default"]["OPTIONS"] = DATABASES["default"].get("OPTIONS", {}) | {
        "pool": {"min_size": 1, "max_size": 10, "timeout": 20},
        "options": "-c statement_timeout=30000",
    }
else:
    DATABASES["default"] = {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": BABL_DATA / "babl.sqlite3",
        "OPTIONS": {
            "transaction_mode": "IMMEDIATE",  # a transaction that reads first cannot fail later when it writes
            "timeout": 20,
            # FULL: a committed question survives a power cut. Only the writer (chat/database.py) checkpoints.
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=0;"
            " PRAGMA journal_size_limit=67108864;",
        },
    }
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en"
USE_I18N = False

STATIC_URL = "/static/"
LOGIN_URL = "/login/"
# Browsers send cookies to every port of a host, so two servers must not use the same names.
_OWN = hashlib.sha256(f"cookies of {SECRET_KEY}".encode()).hexdigest()[:12]
SESSION_COOKIE_NAME = f"babl_session_{_OWN}"
SESSION_COOKIE_AGE = 90 * 24 * 3600
SESSION_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = os.environ.get("BABL_HTTPS") == "1"
CSRF_COOKIE_NAME = f"babl_csrf_{_OWN}"
CSRF_COOKIE_HTTPONLY = True  # pages contain the token, for the header X-CSRFToken
CSRF_FAILURE_VIEW = "babl.web.chat.views.accounts.csrf_failed"
CSRF_TRUSTED_ORIGINS = [each for each in os.environ.get("CSRF_TRUSTED_ORIGINS", "").split(",") if each]
AUTH_PASSWORD_VALIDATORS = [{"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"}]

PROMPT_CHARACTERS = 100_000  # of one message
PASSAGE_CHARACTERS = 1_000_000
UPLOAD_BYTES = 64 * 2**20  # of an import or a question set
LOGIN_BYTES = 16 * 2**10  # of a name and a password
DATA_UPLOAD_MAX_MEMORY_SIZE = UPLOAD_BYTES
FILE_UPLOAD_MAX_MEMORY_SIZE = 2**20  # of a body in memory while it arrives; longer ones go to the disk
TRUSTED_PROXIES = _trusted_proxies()
QUESTIONS_PER_MINUTE = _questions_per_minute()  # of one user
LOGINS_PER_MINUTE = 10  # of one address

LOGGING = {  # never with bodies of requests, or local variables of errors
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {
        "babl.web": {"level": "INFO"},
        "django.request": {"level": "ERROR"},
        "django.security.DisallowedHost": {"level": "CRITICAL"},  # the client is told; a traceback helps nobody
    },
}
