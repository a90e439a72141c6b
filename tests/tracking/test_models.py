"""A network in MLflow's model registry: what is kept of it, and MLflow's own server that answers with it."""

import json
import os
import shutil
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from family import tiny_config
from mlflow import MlflowClient
from mlflow.models import get_model_info
from servers import Server

from wml_ray.cli.main import main
from wml_ray.data.load import load_dataset
from wml_ray.export.network import load_network
from wml_ray.tracking.tags import RUN_ID_TAG

pytestmark = pytest.mark.slow
CONFIG = tiny_config("optim.epochs=2")
REGISTER = ["register", CONFIG.run_id, "--peer", "1", "--name", "digits-small", "--alias", "champion", "--trust"]


class ModelServer(Server):
    """`mlflow models serve` of the registered model."""

    health = "ping"

    def command(self):
        serve = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/digits-small@champion"]
        return [*serve, "--env-manager", "local", "--host", "127.0.0.1", "--port", str(self.port)]

    def logits(self, images):
        """Logits (B, K) of uint8 images (B, C, H, W)."""
        body = json.dumps({"inputs": {"images": images.tolist()}}).encode()
        request = urllib.request.Request(f"{self.uri}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return np.array(json.load(response)["predictions"]["logits"], np.float32)


@pytest.fixture(scope="module")
def registered_place(tmp_path_factory, migrated_store):
    """A working directory in which peer 1 of a tiny run was registered as digits-small@champion."""
    folder = tmp_path_factory.mktemp("registry")
    shutil.copy(migrated_store, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("c.yaml").write_text(CONFIG.to_yaml())
        assert main(["train", "c.yaml"]) == 0
        assert main(REGISTER) == 0
    return folder


@pytest.fixture
def network(registered_place, monkeypatch):
    """Peer 1, in the working directory of its registered model."""
    monkeypatch.chdir(registered_place)
    return load_network(CONFIG.run_folder, 1, trust=True)


def test_a_registered_network_has_signature_card_metrics_and_the_run_as_its_source(network):
    client = MlflowClient("sqlite:///mlflow.db")
    version = client.get_model_version_by_alias("digits-small", "champion")
    source = client.get_run(version.run_id)
    assert source.data.tags[RUN_ID_TAG] == CONFIG.run_id
    assert version.description.startswith(f"# peer 1 of {CONFIG.run_id}")
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.source_run_id == version.run_id
    assert model.params["params"] == str(network.info.params)
    metrics = {metric.key: metric.value for metric in model.metrics}
    assert metrics["export/test_accuracy"] == pytest.approx(network.info.test_accuracy)
    assert metrics["export/file_accuracy"] == pytest.approx(network.info.validation_accuracy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
        info = get_model_info(version.source)
    assert "onnx" in info.flavors
    (images,), (logits,) = info.signature.inputs.inputs, info.signature.outputs.inputs
    assert (images.name, images.shape, images.type) == ("images", (-1, 1, 8, 8), np.dtype("uint8"))
    assert (logits.name, logits.shape) == ("logits", (-1, 10))
    assert info.saved_input_example_info


def test_mlflows_own_server_answers_as_the_network(network, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    dataset = load_dataset(CONFIG)
    images, labels = dataset.pixels(dataset.splits["validation"])
    server = ModelServer(Path.cwd())
    server.start()
    try:
        server.wait()
        logits_BK = server.logits(images.numpy())
        np.testing.assert_allclose(logits_BK, network(images.to(torch.uint8)).numpy(), atol=1e-4)
        accuracy = float((logits_BK.argmax(-1) == labels.numpy()).mean())
        assert accuracy == pytest.approx(network.info.validation_accuracy)
    finally:
        server.kill()
