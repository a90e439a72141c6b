"""The order of the folders, the folders of each heavy library, and start-up without what is not needed."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "wml_ray"
ORDER = [  # a folder imports from the lines above its own, never from a neighbour
    {"errors", "settings", "distributed"},
    {"storage", "networks"},
    {"methods", "tracking"},
    {"config", "report"},
    {"data", "pruning"},
    {"checkpoints"},
    *({"training"}, {"export"}, {"search"}, {"cluster"}, {"verbs"}, {"submit"}, {"cli"}),
]
HOMES = {
    "ray": {"cluster", "submit"},
    "mlflow": {"tracking"},
    "optuna": {"search", "report"},
    "torch_pruning": {"pruning"},
    "argparse": {"cli"},
}
SOURCES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}


def test_a_folder_imports_only_folders_below_it_and_each_heavy_library_has_its_home():
    wrong = []
    for file, source in SOURCES.items():
        folder = file.partition("/")[0]
        if folder in ("__init__", "__main__"):
            continue
        (level,) = (index for index, folders in enumerate(ORDER) if folder in folders)
        allowed = {folder}.union(*ORDER[:level])
        tree = ast.parse(source)
        guards = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ]
        for_types = {node for guard in guards for node in ast.walk(guard)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for package, inner, *_ in (f"{name}.".split(".") for name in names):
                if package == "wml_ray" and inner not in allowed:
                    wrong.append(f"{file} imports {inner}, which is not below {folder}")
                if node not in for_types and folder not in HOMES.get(package, {folder}):
                    wrong.append(f"{file} imports {package}, which only {HOMES[package]} may")
    assert wrong == []


def imported(program, *arguments):
    """Names of all modules loaded after `program` has run in a process of its own."""
    program += "\nimport sys; print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_training_in_one_process_needs_neither_ray_nor_mlflow(tmp_path):
    program = """
import sys
sys.modules["ray"] = sys.modules["mlflow"] = None
from wml_ray.config.load import parse_config
from wml_ray.training.worker import WorkerContext, run_worker
config = parse_config({"optim": {"epochs": 1}, "model": {"backbone": "resnet20", "sharing": [1, 1, 1, 1, 1]},
                       "pruning": {"ratios": [0.5]}, "run": {"storage_path": sys.argv[1]}})
assert 0 < run_worker(config, WorkerContext())["peers"][0]["test_accuracy"] <= 1
"""
    imported(program, tmp_path)


COMMAND = """
from wml_ray.cli.main import main
try: main({})
except SystemExit as end: assert not end.code
"""


@pytest.mark.parametrize(
    ("words", "not_needed"),
    [
        (["--help"], {"torch", "ray", "mlflow", "pydantic", "rich", "numpy"}),
        (["plan", "c.yaml"], {"ray", "mlflow", "optuna", "matplotlib", "sklearn", "torchvision", "pandas"}),
        (["pick", "run"], {"torch", "ray", "mlflow", "optuna", "matplotlib", "sklearn", "pandas", "numpy"}),
        (["train", "c.yaml", "--dry-run"], {"torch", "ray", "optuna", "matplotlib", "sklearn", "torchvision"}),
    ],
    ids=["help", "plan", "pick", "dry run"],
)
def test_a_command_that_only_reads_imports_only_what_it_needs(workplace, words, not_needed):
    (workplace / "c.yaml").write_text("pruning: {saliency_images: 2}")
    (workplace / "run").mkdir()
    peer = {"peer": 0, "params": 1, "macs": 1, "latency_ms": 1.0, "validation_accuracy": 0.5, "test_accuracy": 0.5}
    (workplace / "run" / "result.json").write_text(json.dumps({"peers": [peer], "tree": {}, "predictions": {}}))
    assert not_needed & imported(COMMAND.format(words)) == set()


def test_no_pickle_is_read_from_disk():
    """Checkpoints are safetensors and JSON: pickle can run code when it is loaded.

    The one exception is a state dict of the user's, which PyTorch reads without running any.
    """
    source = "".join(SOURCES.values())
    assert not [word for word in ("import pickle", "allow_pickle", "torch.serialization") if word in source]
    assert [file for file, text in SOURCES.items() if "torch.load" in text] == ["checkpoints/pretrained"]
    tree = ast.parse(SOURCES["checkpoints/pretrained"])
    (load,) = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load")
    assert "weights_only=True" in [ast.unparse(keyword) for keyword in load.keywords]
    assert source.count("torch.load") == 1
