"""What the README shows is what there is, and its commands are run."""

import json
import re
import shlex
from pathlib import Path

import pytest

from wml_ray.cli.main import main
from wml_ray.cluster.space import load_space
from wml_ray.config.load import describe_keys, load_config
from wml_ray.networks.backbones import BACKBONES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_both_commands_stand_by_line_20():
    top = "\n".join(README.splitlines()[:20])
    assert "make quickstart" in top
    assert "make test" in top


def test_the_table_of_keys_is_the_schema():
    assert describe_keys() in README, "paste the output of: python -c 'from wml_ray.config import *; print(describe())'"


def test_the_tree_names_every_file_of_the_package():
    tree = README[README.index("    wml_ray/     ") : README.index("    jobs/     ")]
    assert sorted(re.findall(r"\b\w+\.py\b", tree)) == sorted(path.name for path in (ROOT / "wml_ray").glob("[!_]*.py"))


def test_every_backbone_is_named():
    named = set(re.findall(r"`([\w]+)`", README[README.index("**Networks.**") : README.index("**Sharing.**")]))
    assert {name.removesuffix("_cifar") for name in BACKBONES} <= named


@pytest.mark.slow
def test_the_quickstart_trains_every_peer_to_97_percent(workplace, capsys):
    (workplace / "jobs").symlink_to(ROOT / "jobs")
    assert main(["train", "jobs/quickstart.yaml"]) == 0
    assert "weighted" in capsys.readouterr().out
    (result,) = Path("results").glob("*/*/result.json")
    peers = json.loads(result.read_text())["peers"]
    assert len({peer["params"] for peer in peers}) == 4
    assert all(peer["test_accuracy"] >= 0.97 for peer in peers)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_commands_and_the_python_of_the_readme_run(workplace, capsys):
    for folder in ("jobs", "tune_spaces"):
        (workplace / folder).symlink_to(ROOT / folder)
    commands = [shlex.split(line) for line in re.findall(r"^    wml-ray +(.*)$", README, flags=re.MULTILINE)]
    assert [command[0] for command in commands] == ["plan", "train", "report", "tune", "report"]
    faster = {"train": ["optim.epochs=1"], "tune": ["optim.epochs=1", "--trials", "2", "--grace-epochs", "1"]}
    for command in commands:
        assert main([*command, *faster.get(command[0], [])]) == 0, capsys.readouterr().err
    space, code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (workplace / "space.py").write_text(space)
    assert load_space("space.py", load_config("jobs/search.yaml")).objectives
    (checkpoint,) = Path("results").glob("*/*/checkpoints/epoch-0001")
    names: dict = {}
    exec(code.replace("CHECKPOINT", str(checkpoint)), names)
    assert names["network"][0][0].weight.equal(names["tree"].stages["stem"][0][0].weight)
