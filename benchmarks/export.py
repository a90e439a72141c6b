"""Seconds of an export, and the time that MLflow's own server adds to a request, on a finished run with an MLflow run.

python benchmarks/export.py RUN_FOLDER [PEER]      # in the folder of its mlflow.db, or with MLFLOW_TRACKING_URI

The export is timed after its libraries were imported, with its verification and its card. A request holds one image and
is followed by a call of onnxruntime in this process, one thread; the medians of 200 are compared. `import wml_ray` is
timed in 5 processes of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from wml_ray.export.formats import INPUT, open_onnx, require
from wml_ray.export.network import Network, load_network
from wml_ray.tracking.client import tracking_uri
from wml_ray.verbs import export as verb
from wml_ray.verbs.register import register

NAME, REQUESTS, STARTS = "benchmark-export", 200, 5
IMPORT = "import time; start = time.perf_counter(); import wml_ray; print(time.perf_counter() - start)"


def main(folder: Path, peer: int) -> None:
    starts = [subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True) for _ in range(STARTS)]
    print(f"import wml_ray                         {statistics.median(float(done.stdout) for done in starts):8.3f} s")
    network = load_network(folder, peer)
    for module in ("torch.onnx", "torch.onnx._internal.exporter._core", "torchvision", "sklearn.datasets"):
        __import__(module)
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx")
    with tempfile.TemporaryDirectory() as temporary:
        for to in verb.FORMATS:
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            verb.export_network(network, to, Path(temporary) / to)
            wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
            print(f"export to {to:12} wall, CPU time     {wall_s:8.1f} s {cpu_s:5.1f} s")
        ours = open_onnx(Path(temporary) / "onnx")
        model, _ = register(network, folder, NAME, "champion")
        with served(model.uri) as url:
            compare(network, ours, url)


def compare(network: Network, ours: Callable[[np.ndarray], np.ndarray], url: str) -> None:
    """Print the medians of requests to the server and of calls in this process."""
    image = np.zeros((1, *network.info.spec.shape), np.uint8)
    body = json.dumps({"inputs": {INPUT: image.tolist()}}).encode()
    request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
    calls = {"request": lambda: urllib.request.urlopen(request).read(), "onnxruntime": lambda: ours(image)}
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(REQUESTS + 10):
        for name, call in calls.items():
            start_s = time.perf_counter()
            call()
            if repeat >= 10:  # the first ones warm up
                times_ms[name].append(1000 * (time.perf_counter() - start_s))
    for name, values in times_ms.items():
        print(f"one image, median, 95th percentile     {statistics.median(values):8.3f} ms ", end="")
        print(f"{np.percentile(values, 95):8.3f} ms   {name}")


@contextmanager
def served(model: str) -> Iterator[str]:
    """The address of `mlflow models serve` with a model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": tracking_uri()}
    server = subprocess.Popen(
        [*command, "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                if server.poll() is not None:
                    raise SystemExit(f"`{' '.join(command)}` ended with {server.returncode}") from None
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
