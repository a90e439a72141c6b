"""Chromium on the pages of one local server, and a finished study in MLflow."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from family import tiny_config
from mlflow import MlflowClient
from playwright.sync_api import Page, Request, Response, expect, sync_playwright
from ray.tune import loguniform, uniform
from servers import installed

from wml_ray.cluster.space import make_space
from wml_ray.search.settings import SearchConfig
from wml_ray.verbs.tune import tune

TIMEOUT_MS = 60_000  # the MLflow UI renders slowly on two busy cores
WIDE = {"width": 3200, "height": 1400}  # columns beyond the edge of the window are not rendered
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
ABSENT_WITHOUT_LOGIN = "/ajax-api/2.0/mlflow/users/current"


def chromium() -> Path:
    return installed(shutil.which("chromium"), "chromium")


@contextmanager
def browser_page(server: str) -> Iterator[Page]:
    """An empty page of a new Chromium. Fails at the end if a script or a request to `server` failed."""
    expect.set_options(timeout=TIMEOUT_MS)
    failures: list[str] = []

    def on_response(response: Response) -> None:
        if response.status >= 400 and response.url.startswith(server) and ABSENT_WITHOUT_LOGIN not in response.url:
            failures.append(f"{response.status} {response.url}")

    def on_request_failed(request: Request) -> None:
        if (
            request.url.startswith(server) and request.failure != "net::ERR_ABORTED"
        ):  # the page was left before the response
            failures.append(f"{request.failure} {request.url}")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS, timeout=TIMEOUT_MS)
        page = browser.new_page(viewport=WIDE)
        page.set_default_timeout(TIMEOUT_MS)
        page.on("pageerror", lambda error: failures.append(f"script: {error}"))
        page.on("response", on_response)
        page.on("requestfailed", on_request_failed)
        yield page
        browser.close()
    assert not failures, "\n".join(failures)


def eventually(page: Page, read: Callable[[], object], expected: object) -> None:
    """Wait until `read` returns `expected`: Playwright's `expect` for values that have no locator."""
    deadline_s = time.monotonic() + TIMEOUT_MS / 1000
    while (value := read()) != expected and time.monotonic() < deadline_s:
        page.wait_for_timeout(100)
    assert value == expected


@dataclass(frozen=True)
class LoggedStudy:
    """Addresses of a finished study in MLflow."""

    uri: str
    experiment_id: str
    parent_id: str
    child_ids: tuple[str, ...]


def log_study(uri: str) -> LoggedStudy:
    """A study of four short trials, logged to the MLflow server at `uri`."""
    base = tiny_config("optim.epochs=3", "scale.cpus_per_worker=1")
    domains = {"wml.alpha": uniform(0.0, 0.9), "wml.mirror_step_size": loguniform(0.01, 1.0)}
    space = make_space(base, domains, {"val/accuracy/ensemble_weighted": "max"})
    parent = tune(space, SearchConfig(study="browsed", trials=4, scheduler="none")).tracked
    client = MlflowClient(uri)
    children = client.search_runs([parent.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    children = sorted(children, key=lambda run: run.info.run_name)
    return LoggedStudy(uri, parent.experiment_id, parent.run_id, tuple(run.info.run_id for run in children))
