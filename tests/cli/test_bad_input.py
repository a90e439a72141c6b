"""Mistakes on the command line: exit code 2, one line with the correction, and no file written."""

import os
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from wml_ray.cli.main import main
from wml_ray.networks.backbones import BACKBONES

SPACE = str(Path(__file__).parents[2] / "tune_spaces" / "smoke.py")
CONFIG = "data: {name: digits}\noptim: {epochs: 1}\n"
DATASETS = ["digits", "fashion_mnist", "cifar10", "cifar100", "imagefolder"]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def refusal(tmp_path, monkeypatch, capfd):
    """A function that runs the CLI in an empty folder and returns the one line of its refusal."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(*arguments):
        capfd.readouterr()
        try:
            code = main(list(arguments))
        except SystemExit as exit_:
            code = exit_.code
        lines = capfd.readouterr().err.splitlines()
        assert code == 2, lines
        assert len(lines) == 1, lines
        assert lines[0].startswith("wml-ray")
        assert os.listdir(folder) == []
        return lines[0]

    return run


@pytest.mark.parametrize("verb", ["plan", "train"])
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sead=1"], ["'sead'", "did you mean 'seed'"]),
        (["wml.alfa=0.3"], ["'wml.alfa'", "did you mean 'wml.alpha'"]),
        (["peer_to_per.alpha=0.3"], ["did you mean 'peer_to_peer."]),
        (["wlm.alpha=0.3"], ["'wlm.alpha'", "did you mean 'wml.alpha'"]),
        (["wml.x=red"], ["'wml.x'", "allowed", "wml.alpha", "wml.mirror_step_size"]),
        (["wml.alpha.deep=1"], ["'wml.alpha.deep'"]),
        (["wml.alpha"], ["'wml.alpha'", "key=value"]),
        (["seed=-1"], ["seed = -1", "greater than or equal to 0"]),
        (["seed=2147483648"], ["seed = 2147483648", "2147483647"]),
        (["pruning.ratios.3=1.0"], ["pruning.ratios.3 = 1.0", "less than 1"]),
        (["pruning.ratios=[0, 0.2, 0.4, -0.1]"], ["pruning.ratios.3 = -0.1", "greater than or equal to 0"]),
        (["pruning.ratios.4=0.1"], ["pruning.ratios.4", "0 to 3"]),
        (["pruning.round_to=0"], ["pruning.round_to = 0", "from 1 on", "auto"]),
        (["pruning.ratios=[0.0, 0.5]"], ["pruning.ratios has 2 entries", "4 peers", "one ratio per peer"]),
        (
            ["model.sharing=[1, 2, 3]", "pruning.ratios=[0, 0, 0]"],
            ["model.sharing = [1, 2, 3]", "(3)", "multiple", "(2)"],
        ),
        (["model.sharing=[1, 1, 0, 4, 4]"], ["model.sharing.2 = 0", "greater than or equal to 1"]),
        (["model.sharing=[1, 2, 4]"], ["model.sharing = [1, 2, 4]", "3 entries", "stem, layer1, layer2, layer3, head"]),
        (["model.backbone=resnet21"], ["model.backbone = 'resnet21'", *BACKBONES, "package.module:function"]),
        (
            ["model.backbone=nowhere:stages"],
            ["model.backbone = 'nowhere:stages'", "beside the config file", "PYTHONPATH"],
        ),
        (["model.backbone=:stages"], ["model.backbone = ':stages'"]),
        (["method.name=dlm"], ["method.name = 'dlm'", "did you mean 'dml'", "independent", "package.module:Class"]),
        (["method.name=own:a b"], ["method.name = 'own:a b' is unknown", "package.module:Class"]),
        (["method.name=nowhere:Own"], ["method.name = 'nowhere:Own' cannot be imported", "beside the config file"]),
        (["data.name=mnist"], ["data.name = 'mnist'", *DATASETS]),
        (["data.batch_size=1"], ["data.batch_size = 1", "greater than or equal to 2"]),
        (["data.batch_size=5000"], ["data.batch_size = 5000", "training images", "smaller"]),
        (["wml.alpha=1.5"], ["wml.alpha = 1.5", "less than or equal to 1"]),
        (["wml.mirror_step_size=-0.1"], ["wml.mirror_step_size = -0.1", "greater than or equal to 0"]),
        (["wml.update_every=-1"], ["wml.update_every = -1", "greater than or equal to 1"]),
        (["wml.unroll_learning_rate=-1"], ["wml.unroll_learning_rate = -1", "greater than or equal to 0"]),
        (["wml.temperature=0"], ["wml.temperature = 0", "greater than or equal to 0.01"]),
        (["wml.outer_data=test"], ["wml.outer_data = 'test'", "'train'", "'holdout'"]),
        (["wml=0.3"], ["wml = 0.3"]),
        (["optim.learning_rate=fast"], ["optim.learning_rate = 'fast'", "number"]),
        (["optim.schedule=multistep"], ["optim.schedule = multistep", "optim.milestones", "[15, 25]"]),
        (["optim.warmup_epochs=1"], ["optim.warmup_epochs = 1", "optim.epochs = 1", "fewer"]),
        (["optim.precision=float16"], ["optim.precision = float16", "scale.gpu = true", "bfloat16"]),
        (["scale.workers=-1"], ["scale.workers = -1", "[min, max]"]),
        (["scale.workers=[3, 1]"], ["scale.workers = [3, 1]", "[1, 4]"]),
        (["scale.workers=[1]"], ["scale.workers = [1]", "[min, max]"]),
        (
            ["run.storage_path=http://ann:4711@host/folder"],
            ["run.storage_path: an address with a user or a password", "AWS_ACCESS_KEY_ID"],
        ),
        (["run.storage_path=http://ann:/47?1#1@host"], ["run.storage_path: an address with a user or a password"]),
        (["run.storage_path=http://ann:4711: x@host"], ["run.storage_path: an address with a user or a password"]),
        (["run.storage_path={http://ann:4711@host"], ["override 'run.storage_path=...'"]),
        (["method.name=kd", "teacher.run=s3://ann:4711@bucket/run"], ["teacher.run: an address with a user"]),
        (["run.name=a/b"], ["run.name = 'a/b'", "letters, digits"]),
        (
            ["model.sharing=[1, 1, 1, 1, 2]", "pruning.ratios=[0.0, 0.5]"],
            ["pruning.ratios.1 = 0.5", "out of reach", "at most 0.0", "lower this ratio"],
        ),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else "",
)
def test_a_wrong_setting_is_refused_with_key_value_and_correction(refusal, config, verb, overrides, expected):
    line = refusal(verb, config, *overrides)
    assert "4711" not in line
    assert [words for words in expected if words not in line] == [], line


def test_a_mistake_in_submitted_work_is_refused_before_the_cluster_is_asked(refusal, config, tmp_path):
    assert "did you mean 'wml.alpha'" in refusal("submit", "train", config, "wml.alph=1")
    line = refusal("submit", "tune", config, "--space", "nowhere.py", "--trials", "2")
    assert "space file nowhere.py" in line
    space = tmp_path / "space.py"
    space.write_text(
        "from ray import tune\nOBJECTIVES = {'train/loss': 'min'}\ndef space(): return {'seed': tune.randint(0, 9)}"
    )
    line = refusal("submit", "tune", config, "--space", str(space), "--trials", "2", "--stop-metric", "test/accuracy")
    assert "stop_metric = 'test/accuracy'" in line


@pytest.mark.parametrize("submit", [[], ["submit"]], ids=["tune", "submit tune"])
@pytest.mark.parametrize(
    "address",
    ["postgresql://ann:4711@host/db", "postgresql://ann:/47?1#1@host/db", "postgresql://host/db?password=4711"],
)
def test_a_password_on_the_command_line_is_refused(refusal, config, submit, address):
    """Other users see it in the list of processes, and Ray keeps the command line of a driver."""
    line = refusal(*submit, "tune", config, "--space", SPACE, "--trials", "2", "--storage", address)
    assert "OPTUNA_STORAGE" in line
    assert "47" not in line


@pytest.mark.parametrize("submit", [[], ["submit"]], ids=["compare", "submit compare"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--methods", "wml,dlm"], ["method.name = 'dlm'", "'dml'"]),
        (["--methods", "wml", "--seeds", "0"], ["seeds = 0", "greater than or equal to 1"]),
        (["--methods", "wml", "--seeds", "two"], ["--seeds", "'two'", "--help"]),
        (["--methods", "wml", "--key", "wml.alfa=1"], ["'wml.alfa'", "did you mean 'wml.alpha'"]),
        (["--methods", "wml", "--key", "dml.weight=1"], ["dml.weight", "no effect", "--methods wml"]),
        (["--methods", "wml", "--key", "optim.epochs=3"], ["optim.epochs", "budget"]),
        (["--methods", "wml", "--tune", "-1"], ["tune = -1", "greater than or equal to 0"]),
        (["--methods", "wml", "--study", "a/b"], ["study = 'a/b'"]),
        (["--methods", "kd"], ["kd needs a teacher", "add independent to --methods"]),
        ([], ["--methods", "--help"]),
    ],
    ids=lambda value: " ".join(value) if value[:1] == ["--methods"] else "",
)
def test_a_mistake_in_a_comparison_is_refused(refusal, config, submit, arguments, expected):
    line = refusal(*submit, "compare", config, *arguments)
    assert [words for words in expected if words not in line] == [], line


def test_wrong_published_figures_are_refused(refusal, config, tmp_path):
    (tmp_path / "config.published.csv").write_text("row,top1\nKD,94.6\n")
    line = refusal("compare", config, "--methods", "wml")
    assert "unknown column 'top1'" in line
    assert "peer0" in line


def test_a_missing_dataset_is_refused_with_the_way_to_get_it(refusal, config):
    line = refusal("train", config, "data.name=cifar10", "data.root=nowhere")
    assert "data.root = 'nowhere'" in line
    assert "data.download=true" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_refused(refusal, config):
    line = refusal("train", config, "scale.gpu=true")
    assert "scale.gpu = true" in line
    assert "scale.gpu=false" in line


def test_a_storage_path_that_cannot_be_a_folder_is_refused(refusal, config):
    line = refusal("train", config, f"run.storage_path={config}")
    assert "run.storage_path" in line
    assert config in line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "jobs/"),
        (b"wml: [1, 2\nseed: 3", "not valid YAML"),
        (b"\xff\xfe\x00\x81 not text", "not valid YAML"),
        (b"- seed\n- 0\n", "seed: 0"),
        (b"just words", "seed: 0"),
    ],
    ids=["missing", "half a list", "binary", "a list", "words"],
)
def test_a_file_that_is_not_a_config_is_refused(refusal, tmp_path, content, expected):
    path = tmp_path / "given.yaml"
    if content is not None:
        path.write_bytes(content)
    line = refusal("train", str(path))
    assert str(path) in line
    assert expected in line


def test_a_folder_in_place_of_a_config_file_is_refused(refusal, tmp_path):
    assert str(tmp_path) in refusal("plan", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["VERB", "--help"]),
        (["trian"], ["'trian'", "plan", "train", "report"]),
        (["train"], ["CONFIG", "--help"]),
        (["train", "config.yaml", "--fast"], ["--fast", "--help"]),
        (["submit"], ["train,tune,compare", "wml-ray submit --help"]),
        (["submit", "train", "nowhere.yaml"], ["config file nowhere.yaml"]),
        (["submit", "train", "nowhere.yaml", "--image", "x", "--packages"], ["--packages", "--image"]),
        (["jobs"], ["status,stop,logs", "wml-ray jobs --help"]),
        (["jobs", "stop"], ["NAME", "wml-ray jobs stop --help"]),
        (["jobs", "status", "one", "other"], ["other"]),
    ],
    ids=lambda value: " ".join(value) if value[:1] in (["train"], ["submit"], ["jobs"]) else "",
)
def test_a_wrong_command_is_refused(refusal, arguments, expected):
    line = refusal(*arguments)
    assert [words for words in expected if words not in line] == [], line


# the MLflow server


@pytest.fixture
def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def silent_port():
    """Accepts connections and never responds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


class _OtherServer(BaseHTTPRequestHandler):
    """A web server other than MLflow."""

    def do_GET(self):
        self.send_error(404)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def other_servers_port():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _OtherServer)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["closed_port", "silent_port", "other_servers_port"])
def test_an_unreachable_mlflow_server_is_named_within_ten_seconds(refusal, config, monkeypatch, request, kind):
    port = request.getfixturevalue(kind)
    import wml_ray.verbs.train  # noqa: F401 - the imports are not part of the ten seconds

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{port}")
    start_s = time.monotonic()
    line = refusal("train", config)
    assert time.monotonic() - start_s < 10
    assert "MLFLOW_TRACKING_URI" in line
    assert f"http://127.0.0.1:{port}" in line
    assert "mlflow.db" in line
    assert "secret" not in line


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{port}", "localhost:{port}", "http://127.0.0.1:port", "http://", "file:./mlruns"]
)
def test_a_wrong_mlflow_address_is_refused(refusal, config, monkeypatch, closed_port, address):
    address = address.format(port=closed_port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    line = refusal("train", config)
    assert "MLFLOW_TRACKING_URI" in line
    assert address in line


def test_a_report_of_an_unknown_experiment_is_refused(refusal):
    line = refusal("report", "nothing-here")
    assert "'nothing-here'" in line
