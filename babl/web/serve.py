"""What `babl serve` runs: one web process, which starts the engine's and answers until it is told to end."""

import asyncio
import fcntl
import ipaddress
import os
import signal
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from babl.errors import UserError

DATABASE = "babl.sqlite3"
SECRETS = (f"{DATABASE}*", "secret-key*", "serve.lock")  # in the data folder, for its owner alone
GRACE_SECONDS = 8  # for responses under way when the server is told to end


@dataclass(frozen=True)
class Place:
    """Where a server listens, and what it has.

    Attributes:
        host: Address; another than a loopback one needs login.
        port: 0 takes a free one.
        data: Folder of the database; None for `BABL_HOME`, else ~/.babl.
        models: Folders of models; none for those that `make demo` and `babl train` write.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    data: Path | None = None
    models: Sequence[Path] = ()


def prepare(place: Place) -> Path:
    """Returns the data folder; Django is set up, and its database has all tables.

    Raises:
        UserError: The folder cannot be written, the database cannot be reached, or the environment makes no sense.
    """
    auth = os.environ.get("BABL_AUTH", "local")
    if auth not in ("local", "login"):
        raise UserError(f"BABL_AUTH is {auth!r}, expected local or login")
    folder = _private(place.data)
    os.environ["BABL_DATA"] = str(folder)
    if place.models:
        os.environ["BABL_MODELS"] = os.pathsep.join(str(each.absolute()) for each in place.models)
    os.environ["DJANGO_SETTINGS_MODULE"] = "babl.web.settings"
    import django
    from django.core.exceptions import ImproperlyConfigured
    from django.db import DatabaseError, connections

    try:
        django.setup()
        try:
            _make_tables(folder / DATABASE)
        finally:
            connections.close_all()
    except OSError as error:
        raise UserError(f"--data: {folder} cannot be written ({error.strerror})") from None
    except (DatabaseError, ImproperlyConfigured) as error:
        raise UserError(f"the database cannot be used: {str(error).strip().splitlines()[0]}") from None
    return folder


def _make_tables(embedded: Path) -> None:
    """The database has all tables; the embedded one is the file."""
    from django.core.management import call_command
    from django.db import connection

    if connection.vendor == "postgresql":  # once, by itself: a pool would go on trying
        with connection.wrap_database_errors:
            connection.Database.connect(**connection.get_connection_params()).close()
    else:
        embedded.touch(0o600)  # SQLite makes its journals as readable as this
    call_command("migrate", verbosity=0, interactive=False)


def serve(place: Place) -> int:
    """Returns 0 once the server was told to end, by SIGTERM or Ctrl-C, and has.

    Raises:
        UserError: The address would be open to others without login, or is taken; another server has this data; or a
            folder of models is none.
    """
    for folder in place.models:
        if not folder.is_dir():
            raise UserError(
                f"--models: {folder} is no folder; name one that has models, or a model (`babl pull` makes one)"
            )
    _check_address(place.host)
    listening = _listen(place.host, place.port)
    with _only_one(_private(place.data)):
        prepare(place)
        import uvicorn
        from django.conf import settings

        from babl.web.asgi import Application
        from babl.web.chat.access import link
        from babl.web.chat.accounts import local_user
        from babl.web.chat.database import claim, write
        from babl.web.chat.hub import hub
        from babl.web.connections import Connection, allow_many
        from babl.web.engine.client import DEFAULT_FOLDERS, EngineClient

        if not asyncio.run(write(claim)):
            raise UserError("DATABASE_URL: another server has this database; end it, or choose another one")
        host = f"[{place.host}]" if ":" in place.host else place.host
        link.address = f"http://{host}:{listening.getsockname()[1]}"

        async def open_hub() -> None:
            await write(local_user)
            await hub.open(EngineClient(settings.BABL_MODELS or DEFAULT_FOLDERS, scripted=settings.BABL_SCRIPTED))

        class Server(uvicorn.Server):
            """Tells open streams that it ends; they would keep it waiting."""

            @contextmanager
            def capture_signals(self) -> Iterator[None]:  # uvicorn's would end the process by the signal, afterwards
                before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
                yield
                for each, handler in before.items():
                    signal.signal(each, handler)

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                super().handle_exit(sig, frame)
                hub.end()

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started:
                    where = link if settings.BABL_AUTH == "local" else link.address
                    print(f"Babl is at {where}  (Ctrl-C ends it)", flush=True)

        allow_many()
        config = uvicorn.Config(
            Application(open_hub, hub.close),
            http=Connection,
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
            proxy_headers=bool(settings.TRUSTED_PROXIES),
            forwarded_allow_ips=settings.TRUSTED_PROXIES,
        )
        server = Server(config)
        server.run(sockets=[listening])
    return 0 if server.started else 1


def add_user(name: str, password: str, data: Path | None = None) -> None:
    """The user can log in with this password alone: keys of the API and logins of before let nobody in any more.

    Raises:
        UserError: The password is too short.
    """
    prepare(Place(data=data))
    from django.contrib.auth.password_validation import validate_password
    from django.core.exceptions import ValidationError

    from babl.web.chat.accounts import set_password

    try:
        validate_password(password)
    except ValidationError as error:
        raise UserError(" ".join(error.messages)) from None
    set_password(name, password)


def remove_user(name: str, data: Path | None = None) -> int:
    """Returns how many conversations are gone with the user, and all else that was theirs.

    Raises:
        UserError: There is no such user.
    """
    prepare(Place(data=data))
    from babl.web.chat.accounts import remove_user as remove

    return remove(name)


def _check_address(host: str) -> None:
    """Nobody but this machine's users can reach the address, or whoever does must log in."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise UserError(f"--host is {host!r}, expected an IP address") from None
    needed = {"BABL_AUTH=login": os.environ.get("BABL_AUTH") == "login"}
    needed |= {name: bool(os.environ.get(name)) for name in ("SECRET_KEY", "ALLOWED_HOSTS")}
    missing = [name for name, there in needed.items() if not there]
    if not loopback and missing:
        raise UserError(f"--host is {host}, which others can reach; set {', '.join(missing)} in the environment first")


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}, expected 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Only of a socket that names TCP does asyncio turn off Nagle's algorithm, which holds text back for 40 ms.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()  # two servers may both be bound, but only one of them gets further
    except OSError as error:
        raise UserError(f"--port: {host}:{port} cannot be listened at ({error.strerror}); choose another one") from None
    return listening


def _private(data: Path | None) -> Path:
    """Returns the data folder, in which nobody else can read or write: it is made, or mended.

    Raises:
        UserError: It cannot be.
    """
    folder = data or Path(os.environ.get("BABL_DATA") or os.environ.get("BABL_HOME") or Path.home() / ".babl")
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_mode & stat.S_ISVTX or folder == folder.parent:
            raise UserError(f"--data: {folder} is a folder that all accounts share; choose one of your own")
        for path in (folder, *(each for name in SECRETS for each in folder.glob(name))):
            if path.stat().st_mode & 0o077:
                path.chmod(0o700 if path == folder else 0o600)
            if path.stat().st_mode & 0o077:  # as on a disk that keeps no permissions
                raise UserError(
                    f"--data: others can read {path}, and this disk cannot forbid it; choose another folder"
                )
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise UserError(f"--data: {error.filename or folder} {reason}; choose another folder") from None
    return folder


def _only_one(folder: Path) -> IO[str]:
    """Returns a file that is locked while it is open: two servers would each take the other's answers for lost ones.

    Raises:
        UserError: It is locked already, or cannot be written.
    """
    try:
        (folder / "serve.lock").touch(0o600)
        file = (folder / "serve.lock").open("w")
    except OSError as error:
        raise UserError(f"--data: {folder} cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"--data: another server has {folder}; end it, or choose another folder") from None
    return file
