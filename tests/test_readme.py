"""README and docs: commands and Python blocks run, and the lists are those of the code."""

import json
import re
import shlex
from pathlib import Path

import pytest
from small_sets import make_image_folder

import wml_ray
from wml_ray.cli.main import main
from wml_ray.cli.options import parse_arguments
from wml_ray.config.load import describe_keys
from wml_ray.networks.backbones import BACKBONES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
PAGES = {"README": README, **DOCS}
FASTER = {
    "train": ["optim.epochs=1"],
    "compare": ["optim.epochs=1", "--methods", "wml,dml", "--seeds", "1"],
    "tune": ["optim.epochs=1", "--trials", "2", "--grace-epochs", "1"],
}


def commands(text):
    """The words of each `wml-ray` command line, without `wml-ray`."""
    lines = re.findall(r"^    wml-ray +(.*)$", text, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_install_and_test_commands_are_in_the_first_20_lines():
    top = "\n".join(README.splitlines()[:20])
    assert "make quickstart" in top
    assert "make test" in top


def test_the_table_of_keys_is_that_of_the_schema():
    assert describe_keys() in DOCS["config"], "docs/config.md is not up to date: make docs"


def test_the_folder_list_names_every_folder_and_module_of_the_package():
    listed = re.search(r"^    wml_ray/\n((?:      .*\n)+)", README, flags=re.MULTILINE)[1]
    folders = {path.parent.name for path in (ROOT / "wml_ray").glob("*/__init__.py")}
    assert set(re.findall(r"^      (\w+)/ ", listed, flags=re.MULTILINE)) == folders
    assert {path.stem for path in (ROOT / "wml_ray").glob("[!_]*.py")} == set(
        listed.splitlines()[0].split("  ")[3].split()
    )


def test_every_backbone_is_listed():
    named = set(re.findall(r"`(\w+)`", DOCS["adding-a-network"]))
    assert {name.removesuffix("_cifar") for name in BACKBONES} <= named


def test_every_link_to_a_file_has_its_target():
    folders = {"README": ROOT, **dict.fromkeys(DOCS, ROOT / "docs")}
    links = [(folders[page] / link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    assert links
    assert [link for link in links if not link.exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_is_accepted_by_the_parser(page):
    for words in commands(PAGES[page]):
        parse_arguments(words)


@pytest.mark.parametrize(
    ("epochs", "accuracy"),
    [pytest.param(10, 0.75, marks=pytest.mark.core), pytest.param(30, 0.97, marks=pytest.mark.nightly)],
)
def test_the_quickstart_trains_every_peer(workplace, capsys, epochs, accuracy):
    (workplace / "jobs").symlink_to(ROOT / "jobs")
    assert main(["train", "jobs/quickstart.yaml", f"optim.epochs={epochs}"]) == 0
    assert "weighted" in capsys.readouterr().out
    (result,) = Path("results").glob("*/*/result.json")
    peers = json.loads(result.read_text())["peers"]
    assert len({peer["params"] for peer in peers}) == 4
    assert all(peer["test_accuracy"] >= accuracy for peer in peers)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_commands_of_the_readme_train_from_shards_on_s3(workplace, bucket, capsys):
    (workplace / "jobs").symlink_to(ROOT / "jobs")
    make_image_folder(workplace / "photos", images_a_class=40)
    lines = [
        [word.replace("s3://BUCKET", bucket) for word in words] for words in commands(README) if "s3" in str(words)
    ]
    assert [words[0] for words in lines] == ["shard", "train"]
    for words in lines:
        faster = ["data.resolution=16", f"data.cache_path={workplace}/cache", "optim.epochs=1"]
        assert main([*words, *(faster if words[0] == "train" else [])]) == 0, capsys.readouterr().err


@pytest.mark.core
@pytest.mark.usefixtures("ray_cluster")
def test_the_commands_and_the_python_of_readme_and_docs_run(workplace, capsys):
    for folder in ("jobs", "tune_spaces"):
        (workplace / folder).symlink_to(ROOT / folder)
    lines = [words for words in commands(README) + commands(DOCS["search"]) if "s3://BUCKET" not in " ".join(words)]
    in_process = [words for words in lines if words[0] not in ("submit", "jobs")]
    assert {words[0] for words in in_process} == {"plan", "train", "report", "tune", "compare"}
    for words in in_process:
        assert main([*words, *FASTER.get(words[0], [])]) == 0, capsys.readouterr().err
    space, *blocks = python_blocks(README)
    (workplace / "space.py").write_text(space)
    assert wml_ray.load_space("space.py", wml_ray.load_config("jobs/search.yaml")).objectives
    checkpoint = next(Path("results").glob("*/*/checkpoints/epoch-0001"))
    names: dict = {}
    for block in [*blocks, *python_blocks(DOCS["files"])]:
        exec(block.replace("CHECKPOINT", str(checkpoint)), names)
    assert list(names["result"].peers["test_accuracy"].between(0, 1)) == [True] * 4
    assert not names["network"].training
    exec(python_blocks(DOCS["adding-a-network"])[0], names)
    assert callable(names["stages"])
