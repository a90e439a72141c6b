"""jobs/serve.py as a process of its own, with a Ray instance of its own, asked over HTTP."""

import io
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from deadline import DEADLINE_S
from PIL import Image
from servers import Server

from wml_ray.data.load import load_dataset
from wml_ray.verbs.run import load_run

ROOT = Path(__file__).parent.parent
LINES = 120
IMAGES = 20


class Serve(Server):
    """jobs/serve.py with the run `store`."""

    health = "-/healthz"

    def command(self):
        return [sys.executable, str(ROOT / "jobs" / "serve.py"), self.store, "--port", str(self.port), "--trust"]

    def ask(self, query="", body=None):
        """Status and answer."""
        try:
            with urllib.request.urlopen(f"{self.uri}/{query}", body, timeout=DEADLINE_S) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def end(self):
        """Stop the driver, which stops its Ray instance."""
        self.signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()


@pytest.fixture
def served(teacher_run, empty_workplace, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{ROOT}")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    server = Serve(empty_workplace, str(teacher_run))
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.end()


def test_the_application_is_short():
    assert len((ROOT / "jobs" / "serve.py").read_text().splitlines()) <= LINES


@pytest.mark.slow
def test_networks_of_a_run_answer_at_one_address_as_in_python(served, teacher_run):
    run = load_run(teacher_run, trust=True)
    networks = {**{str(peer): run.peer(peer) for peer in run.peers.index}, "ensemble": run.ensemble()}
    images = [_image(pixels) for pixels in load_dataset(run.config).images[:IMAGES]]

    status, description = served.ask()
    assert status == 200
    assert description["networks"]["3"]["classes"] == list("0123456789")
    assert {name: of["macs"] for name, of in description["networks"].items()} == {
        name: network.info.macs for name, network in networks.items()
    }
    latencies = description["latency_ms"]

    names = [list(networks)[index % len(networks)] for index in range(IMAGES)]
    with ThreadPoolExecutor(IMAGES) as threads:  # at once, so that batches hold images of several networks
        answers = list(threads.map(lambda name, image: served.ask(f"?peer={name}", _png(image)), names, images))
    for name, image, (status, answer) in zip(names, images, answers, strict=True):
        (expected,) = networks[name].predict(image)[["class", "probability"]].to_dict("records")
        assert (status, answer["network"], answer["class"]) == (200, name, expected["class"])
        assert answer["probability"] == pytest.approx(expected["probability"], abs=1e-5)

    best = max(networks.values(), key=lambda network: network.info.validation_accuracy).info.validation_accuracy
    assert served.ask("", _png(images[0]))[1]["network"] == "ensemble"
    slow = served.ask("?max_latency_ms=1e9", _png(images[0]))[1]["network"]
    assert networks[slow].info.validation_accuracy == best
    limit = min(latencies.values())
    assert latencies[served.ask(f"?max_latency_ms={limit}", _png(images[0]))[1]["network"]] == limit

    for query, body, message in (
        ("", b"no image", "the body is no image that can be decoded"),
        ("?peer=9", _png(images[0]), "peer=9 is unknown; there are 0, 1, 2, 3, ensemble"),
        ("?max_latency_ms=1e-9", _png(images[0]), "the fastest network takes"),
        ("?max_latency_ms=fast", _png(images[0]), "could not convert string to float: 'fast'"),
    ):
        status, answer = served.ask(query, body)
        assert status == 400
        assert message in answer["error"]


def _image(pixels):
    """A digits scan, whose pixels are 0 to 16, as an image file would have it."""
    return Image.fromarray((pixels[0].numpy() * (255 / 16)).round().astype("uint8"))


def _png(image):
    body = io.BytesIO()
    image.save(body, "PNG")
    return body.getvalue()
