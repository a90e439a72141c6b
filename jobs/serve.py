"""The networks of one run behind one HTTP address, on Ray Serve: batched, autoscaled, with a health check.

    python jobs/serve.py RUN [--port 8000]                        # a run id below results/, a folder or an address
    curl localhost:8000                                           # the networks, with sizes, latency and accuracy
    curl "localhost:8000?peer=2" --data-binary @digit.png         # a PNG, JPEG or WebP file, of any size
    curl "localhost:8000?max_latency_ms=2" --data-binary @digit.png   # the most accurate network that is fast enough

Without a query the ensemble answers. Latencies are of one image, measured as a replica starts. Needs
`pip install 'wml_ray[serve]'`. On Kubernetes: deploy/kuberay/rayservice.yaml.
"""

import argparse
import asyncio
import io
import statistics
import timeit
from collections import defaultdict
from typing import Any

import torch
from PIL import Image
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import wml_ray

MAX_BATCH, BATCH_WAIT_S = 32, 0.002
AUTOSCALING = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8}


@serve.deployment(autoscaling_config=AUTOSCALING, max_ongoing_requests=64, health_check_period_s=10)
class Family:
    """All peers of a run and their ensemble; each replica holds them all."""

    def __init__(self, run: str, storage_path: str = "results", trust: bool = False) -> None:
        torch.set_num_threads(1)
        self.run = wml_ray.load_run(run, storage_path, trust)
        peers = {str(peer): self.run.peer(peer) for peer in self.run.peers.index}
        self.networks = {**peers, "ensemble": self.run.ensemble()}
        self.latency_ms = {name: _latency_ms(network) for name, network in self.networks.items()}

    def check_health(self) -> None:
        """Serve replaces a replica whose networks no longer answer."""
        for name, network in self.networks.items():
            if not network(torch.zeros(1, *network.info.spec.shape)).isfinite().all():
                raise RuntimeError(f"{name} gives logits that are not finite")

    async def __call__(self, request: Request) -> Response:
        """GET describes the networks; POST classifies the image file in the body."""
        if request.method == "GET":
            return JSONResponse(self._description())
        try:
            name = self._chosen(request.query_params)
            image = await asyncio.to_thread(_decoded, await request.body(), self.run.config.data.max_pixels)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        return JSONResponse({"network": name, **await self._classify((name, image))})

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _classify(self, requests: list[tuple[str, Image.Image]]) -> list[dict[str, Any]]:
        """Class and probability of each image; a network runs once for all images of the batch that are its own."""
        positions = defaultdict(list)
        for position, (name, _) in enumerate(requests):
            positions[name].append(position)
        answers: list[dict[str, Any]] = [{} for _ in requests]
        for name, mine in positions.items():
            images = [requests[position][1] for position in mine]
            frame = await asyncio.to_thread(self.networks[name].predict, images)
            for position, answer in zip(mine, frame[["class", "probability"]].to_dict("records"), strict=True):
                answers[position] = answer
        return answers

    def _chosen(self, query: Any) -> str:
        if "max_latency_ms" in query:
            fast = [name for name, ms in self.latency_ms.items() if ms <= float(query["max_latency_ms"])]
            if not fast:
                raise ValueError(f"max_latency_ms: the fastest network takes {min(self.latency_ms.values()):.3f} ms")
            return max(fast, key=lambda name: (self.networks[name].info.validation_accuracy, -self.latency_ms[name]))
        name = query.get("peer", "ensemble")
        if name not in self.networks:
            raise ValueError(f"peer={name} is unknown; there are {', '.join(self.networks)}")
        return str(name)

    def _description(self) -> dict[str, Any]:
        keys = ("params", "macs", "validation_accuracy", "classes")
        sizes = {name: {key: getattr(of.info, key) for key in keys} for name, of in self.networks.items()}
        return {"run": self.run.config.run_id, "networks": sizes, "latency_ms": self.latency_ms}


def _latency_ms(network: wml_ray.Network) -> float:
    image = torch.zeros(1, *network.info.spec.shape)
    return 1000 * statistics.median(timeit.repeat(lambda: network(image), number=1, repeat=20))


def _decoded(body: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(body))
        if image.width * image.height > max_pixels:
            raise ValueError(f"it has more than {max_pixels:,} pixels")
        image.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the body is no image that can be decoded ({error})") from None
    return image


def app(arguments: dict[str, str]) -> serve.Application:
    """The application for `serve run jobs.serve:app run=RUN`, and for `import_path` of a RayService."""
    return Family.bind(arguments["run"], arguments.get("storage_path", "results"), arguments.get("trust") == "true")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", metavar="RUN", help="run id, or folder or address of a run")
    parser.add_argument("--port", type=int, default=8000, help="on this machine's loopback address (8000)")
    parser.add_argument("--storage-path", default="results", help="folder or address of all runs (results)")
    parser.add_argument("--trust", action="store_true", help="import code of your own that the run names")
    options = parser.parse_args()
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(Family.bind(options.run, options.storage_path, options.trust), blocking=True)
