"""The layers of DESIGN: each module imports only those above it, and one home for each heavy dependency."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "wml_ray"
LAYERS = [
    *("config", "backbones", "tree", "costs", "pruning", "objective", "weights"),
    *("readers", "data", "metrics", "memory"),
    *("batchnorm", "loop", "delivery", "storage", "lock", "checkpoint", "uploads", "session"),
    *("tracking", "study", "records", "ledger"),
    *("report", "study_tables", "study_pictures", "study_report", "space", "sweep"),
    *("ray_mailbox", "ray_metrics", "ray_train", "ray_room", "ray_schedulers", "ray_tune", "preflight"),
    *("run", "tune", "progress", "cli"),
    *("job_entry", "job_package", "submission"),
]
HOMES = {
    "ray": {
        *("ray_mailbox", "ray_metrics", "ray_train", "ray_room", "ray_schedulers", "ray_tune"),
        *("preflight", "submission"),
    },
    "mlflow": {"tracking"},
    "optuna": {"study"},
    "torch_pruning": {"pruning"},
    "argparse": {"cli"},
}


def imports_of(module):
    """Every module name `module` imports, at any depth of the file."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_every_module_has_its_layer():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"} == set(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_a_module_imports_only_the_layers_above_it(module):
    above = set(LAYERS[: LAYERS.index(module)])
    imported = {name.split(".")[1] for name in imports_of(module) if name.startswith("wml_ray.")}
    assert imported <= above
    assert not {name for name in imports_of(module) if name.split(".")[0] in ("jobs", "tune_spaces")}


@pytest.mark.parametrize("package", HOMES)
def test_a_heavy_dependency_has_one_home(package):
    users = {module for module in LAYERS if package in {name.split(".")[0] for name in imports_of(module)}}
    assert users == HOMES[package]


def test_everything_down_to_the_session_runs_without_ray_and_mlflow(tmp_path):
    """A notebook or a bare GPU box: neither package is even looked for."""
    program = """
import sys
sys.modules["ray"] = sys.modules["mlflow"] = None
import torch
from wml_ray import session
from wml_ray.config import parse
from wml_ray.data import Shard
config = parse({"optim": {"epochs": 1}, "model": {"backbone": "resnet20", "sharing": [1, 1, 1, 1, 1]},
                "pruning": {"ratios": [0.5]}, "run": {"storage_path": sys.argv[1]}})
result = session.run_worker(config, Shard(), torch.device("cpu"), lambda event: None, lambda *log: None)
assert 0 < result["peers"][0]["test_accuracy"] <= 1
"""
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from wml_ray import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "mlflow", "pydantic", "rich", "numpy"} & set(loaded)


def test_no_pickle_is_read_from_disk():
    """Safetensors and JSON only: `torch.load` and `pickle` appear nowhere in the package."""
    source = "".join(path.read_text() for path in PACKAGE.glob("*.py"))
    assert "import pickle" not in source
    assert "torch.load" not in source
    assert "allow_pickle" not in source
