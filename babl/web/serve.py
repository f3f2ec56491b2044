"""`babl serve`: one web process, which starts the engine process and serves until it is stopped."""

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
SECRETS = (f"{DATABASE}*", "secret-key*", "serve.lock")  # in the data folder, readable by its owner alone
GRACE_SECONDS = 8  # for running responses when the server is stopped


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens, and its folders.

    Attributes:
        host: Address to listen on; any but a loopback address needs login.
        port: 0 takes a free one.
        data: Folder of the database; None for `BABL_HOME`, else ~/.babl.
        models: Folders of models; none for the engine's own choice, models and runs.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    data: Path | None = None
    models: Sequence[Path] = ()


def prepare(options: ServerOptions) -> Path:
    """Sets up Django and creates the tables of its database; returns the data folder.

    Raises:
        UserError: The folder cannot be written, the database cannot be reached, or the environment is invalid.
    """
    auth = os.environ.get("BABL_AUTH", "local")
    if auth not in ("local", "login"):
        raise UserError(f"BABL_AUTH is {auth!r}, expected local or login")
    folder = _private_folder(options.data)
    os.environ["BABL_DATA"] = str(folder)
    if options.models:
        os.environ["BABL_MODELS"] = os.pathsep.join(str(each.absolute()) for each in options.models)
    os.environ["DJANGO_SETTINGS_MODULE"] = "babl.web.settings"
    import django
    from django.core.exceptions import ImproperlyConfigured
    from django.db import DatabaseError, connections

    try:
        django.setup()
        try:
            _migrate(folder / DATABASE)
        finally:
            connections.close_all()
    except OSError as error:
        raise UserError(f"--data: {folder} cannot be written ({error.strerror})") from None
    except (DatabaseError, ImproperlyConfigured) as error:
        raise UserError(f"the database cannot be used: {str(error).strip().splitlines()[0]}") from None
    return folder


def _migrate(embedded: Path) -> None:
    """Creates or migrates the tables.

    Args:
        embedded: File of the database, if it is the embedded one.
    """
    from django.core.management import call_command
    from django.db import connection

    if connection.vendor == "postgresql":  # once, by itself: a pool would retry
        with connection.wrap_database_errors:
            connection.Database.connect(**connection.get_connection_params()).close()
    else:
        embedded.touch(0o600)  # SQLite gives its journals the same permissions
    call_command("migrate", verbosity=0, interactive=False)


def serve(options: ServerOptions) -> int:
    """Serves until SIGTERM or Ctrl-C; returns the exit status.

    Raises:
        UserError: The address would be open to others without login, or is in use; another server uses this data; or a
            folder of models does not exist.
    """
    for folder in options.models:
        if not folder.is_dir():
            raise UserError(
                f"--models: {folder} is not a folder; name one that has models, or a model (`babl pull` makes one)"
            )
    _check_address(options.host)
    listening = _listen(options.host, options.port)
    with _lock_folder(_private_folder(options.data)):
        prepare(options)
        import uvicorn
        from django.conf import settings

        from babl.web.asgi import Application
        from babl.web.chat.access import link
        from babl.web.chat.accounts import local_user
        from babl.web.chat.database import lock, write
        from babl.web.chat.hub import hub
        from babl.web.connections import Connection, raise_file_limit
        from babl.web.engine.client import DEFAULT_FOLDERS, EngineClient

        if not asyncio.run(write(lock)):
            raise UserError("DATABASE_URL: another server uses this database; stop it, or choose another one")
        host = f"[{options.host}]" if ":" in options.host else options.host
        link.address = f"http://{host}:{listening.getsockname()[1]}"

        async def open_hub() -> None:
            await write(local_user)
            await hub.open(EngineClient(settings.BABL_MODELS or DEFAULT_FOLDERS, scripted=settings.BABL_SCRIPTED))

        class Server(uvicorn.Server):
            """Closes open streams when it is stopped, which would keep it waiting."""

            @contextmanager
            def capture_signals(self) -> Iterator[None]:  # uvicorn would raise the signal again at the end
                before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
                yield
                for each, handler in before.items():
                    signal.signal(each, handler)

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                super().handle_exit(sig, frame)
                hub.begin_close()

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started:
                    where = link if settings.BABL_AUTH == "local" else link.address
                    print(f"Babl is at {where}  (Ctrl-C stops it)", flush=True)

        raise_file_limit()
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
    """Creates a user or sets its password; revokes its API keys and ends its sessions.

    Raises:
        UserError: The password is too short.
    """
    prepare(ServerOptions(data=data))
    from django.contrib.auth.password_validation import validate_password
    from django.core.exceptions import ValidationError

    from babl.web.chat.accounts import set_password

    try:
        validate_password(password)
    except ValidationError as error:
        raise UserError(" ".join(error.messages)) from None
    set_password(name, password)


def remove_user(name: str, data: Path | None = None) -> int:
    """Deletes a user and everything of theirs; returns the number of conversations.

    Raises:
        UserError: There is no such user.
    """
    prepare(ServerOptions(data=data))
    from babl.web.chat.accounts import remove_user as remove

    return remove(name)


def _check_address(host: str) -> None:
    """Checks that only users of this machine can reach the address, or that login is required.

    Raises:
        UserError: Others could reach it without login, or it is not an address.
    """
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
    """Returns a listening socket.

    Raises:
        UserError: The port is out of bounds or in use, or the address is not this machine's.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}, expected 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio turns off Nagle's algorithm, which delays text by 40 ms, only for a socket that names TCP.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()  # two servers may both bind, but only one can listen
    except OSError as error:
        raise UserError(f"--port: {host}:{port} cannot be used ({error.strerror}); choose another one") from None
    return listening


def _private_folder(data: Path | None) -> Path:
    """Creates the data folder, or makes it private to its owner; returns it.

    Raises:
        UserError: It cannot be created or made private.
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
            if path.stat().st_mode & 0o077:  # as on a disk without permissions
                raise UserError(
                    f"--data: others can read {path}, and this disk cannot forbid it; choose another folder"
                )
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise UserError(f"--data: {error.filename or folder} {reason}; choose another folder") from None
    return folder


def _lock_folder(folder: Path) -> IO[str]:
    """Locks the data folder while the returned file is open: each of two servers would mark the other's answers lost.

    Raises:
        UserError: Another server has locked it, or it cannot be written.
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
        raise UserError(f"--data: another server uses {folder}; stop it, or choose another folder") from None
    return file
