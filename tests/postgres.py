"""A real PostgreSQL server for one test."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from servers import free_port, installed

USER = DATABASE = "wml"
TIMEOUT_S = 60


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A running server with an empty database; server and data are removed afterwards."""
    programs = _programs()
    # Other users cannot read pytest's folder, and its path is too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="wml-postgres-", dir="/tmp"))
    server = Postgres(programs, folder)
    try:
        server.create()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


class Postgres:
    def __init__(self, programs: Path, folder: Path):
        self.programs, self.folder, self.data = programs, folder, folder / "data"
        self.port, self.password = free_port(), secrets.token_urlsafe(16)
        self.url = self._url(DATABASE)

    def create(self) -> None:
        password_file = self.folder / "password"
        password_file.write_text(self.password)
        if identity := _identity():
            shutil.chown(self.folder, *identity.values())
            shutil.chown(password_file, *identity.values())
        login = ["--username", USER, "--auth", "scram-sha-256", "--pwfile", password_file]
        self._run("initdb", "--pgdata", self.data, *login, "--encoding", "UTF8", "--no-locale", "--no-sync")
        self.start()
        self.database(DATABASE)

    def database(self, name: str) -> str:
        """Create a database; returns its address. MLflow and Optuna need one each, as both use `alembic_version`."""
        self._run("createdb", "--host", "127.0.0.1", "--port", self.port, "--username", USER, name)
        return self._url(name)

    def _url(self, database: str) -> str:
        return f"postgresql+psycopg://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server and wait until it accepts connections, after recovery from a kill."""
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._pg_ctl("start", "--log", self.folder / "server.log", "--options", options)

    def kill(self) -> None:
        """Kill all processes of the server with SIGKILL."""
        postmaster = psutil.Process(int((self.data / "postmaster.pid").read_text().split()[0]))
        processes = [postmaster, *postmaster.children(recursive=True)]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=TIMEOUT_S)

    def stop(self) -> None:
        if (self.data / "postmaster.pid").exists():
            self._pg_ctl("stop", "--mode", "fast")

    def _pg_ctl(self, action: str, *arguments: object) -> None:
        self._run("pg_ctl", action, "--pgdata", self.data, "--wait", "--timeout", TIMEOUT_S, *arguments)

    def _run(self, program: str, *arguments: object) -> None:
        done = subprocess.run(
            [str(self.programs / program), *map(str, arguments)],
            cwd=self.folder,
            env={**os.environ, "PGPASSWORD": self.password},
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / "output.log").open("a"),
            stderr=subprocess.STDOUT,
            **_identity(),
        )
        logs = "\n".join(path.read_text() for path in self.folder.glob("*.log"))
        assert done.returncode == 0, f"{program} failed\n{logs}"


def _programs() -> Path:
    """The folder of initdb and pg_ctl; on Debian there is one for each version, outside of PATH."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    return installed(shutil.which("pg_ctl", path=versions[-1] if versions else None), "postgresql").parent


def _identity() -> dict[str, int]:
    """User and group of the server: PostgreSQL does not run as root."""
    if os.getuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    account = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return {"user": account.pw_uid, "group": account.pw_gid}
