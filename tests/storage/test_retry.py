import pytest

from wml_ray.storage import retry
from wml_ray.storage.paths import to_path
from wml_ray.storage.retry import RetryQueue, retry_for, retry_storage


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
