import errno
import time
from pathlib import Path

import pytest

from wml_ray.cli.main import main
from wml_ray.errors import UserError
from wml_ray.storage import retry
from wml_ray.storage.paths import to_path
from wml_ray.storage.retry import RetryQueue, StorageUnavailable, retry_for, retry_storage


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(retry, "RETRY_S", 0.001)


def failing(times, error):
    """A call that fails so many times and then returns the number of calls."""
    calls = []

    def call():
        calls.append(None)
        if len(calls) <= times:
            raise error
        return len(calls)

    return call


def test_a_call_is_repeated_until_it_succeeds_with_one_warning():
    with pytest.warns(UserWarning, match="^first: away$") as warned:
        result = retry_for(
            failing(3, OSError("away")), 10, OSError, lambda error: error, warning=lambda error: f"first: {error}"
        )
    assert result == 4
    assert len(warned) == 1


def test_after_the_timeout_the_callers_error_is_raised():
    with pytest.raises(RuntimeError, match="gave up: away"):
        retry_for(failing(9999, OSError("away")), 0.01, OSError, lambda error: RuntimeError(f"gave up: {error}"))


@pytest.mark.parametrize("error", [FileNotFoundError(), ValueError()])
def test_permanent_and_other_errors_are_raised_at_once(error):
    call = failing(1, error)
    with pytest.raises(type(error)):
        retry_for(call, 10, OSError, lambda error: error, permanent=FileNotFoundError)
    assert call() == 2


def test_a_missing_client_package_is_reported_at_once():
    with pytest.raises(ImportError, match="install s3fs"):
        retry_storage(failing(1, ImportError("install s3fs")), to_path("memory://bucket/folder"))


class Refused(Exception):
    """As MLflow's exception for HTTP status 401."""

    def get_http_status_code(self):
        return 401


NoCredentialsError = type("NoCredentialsError", (Exception,), {})
TOO_LONG = OSError(errno.ENAMETOOLONG, "File name too long")


@pytest.mark.parametrize(
    ("path", "error", "expected"),
    [
        ("memory://bucket/folder", ModuleNotFoundError("no s3fs"), ImportError),
        ("memory://bucket/folder", PermissionError("wrong key"), StorageUnavailable),
        ("memory://bucket/folder", NoCredentialsError("none"), StorageUnavailable),
        ("folder", PermissionError(errno.EACCES, "denied"), StorageUnavailable),
        ("folder", TOO_LONG, UserError),
    ],
)
def test_an_error_that_cannot_pass_is_raised_at_the_first_attempt(path, error, expected):
    call = failing(1, error)
    with pytest.raises(expected) as raised:
        retry_storage(call, to_path(path))
    assert raised.type in (expected, type(error))
    assert call() == 2


def test_a_path_that_is_too_long_is_one_line_at_once(empty_workplace, capsys):
    Path("c.yaml").write_text("seed: 0")
    assert main(["plan", "c.yaml", f"run.storage_path={'x' * 300}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "longer than 255 bytes" in line
    assert "x" * 201 not in line


@pytest.mark.parametrize("error", [Refused(), ImportError("no psycopg"), PermissionError("wrong key")])
def test_a_closed_queue_does_not_wait_for_an_error_that_cannot_pass(error):
    queue = RetryQueue("waits ({})")
    queue.put(failing(10**9, error))
    start_s = time.monotonic()
    assert queue.close(30) == 1
    assert time.monotonic() - start_s < 10


@pytest.mark.filterwarnings("ignore:waits")
def test_a_queue_runs_operations_in_order_and_repeats_the_one_that_fails():
    done, call = [], failing(2, OSError("away"))
    queue = RetryQueue("waits ({})")
    queue.put(lambda: done.append(call()))
    queue.put(lambda: done.append("second"))
    assert queue.close(10) == 0
    assert done == [3, "second"]


@pytest.mark.filterwarnings("ignore:waits")
def test_a_closed_queue_returns_the_number_of_operations_left():
    queue = RetryQueue("waits ({})")
    for _ in range(2):
        queue.put(failing(10**9, OSError("away")))
    assert queue.close(0.05) == 2
