"""README and docs: commands and Python blocks run, and the lists are those of the code."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deadline import DEADLINE_S
from servers import free_port
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
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ON_THE_QUICKSTART = {"pick", "export", "evaluate", "register"}  # verbs of the section on its networks
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


def test_the_run_in_the_readme_is_that_of_the_quickstart():
    run_id = wml_ray.load_config(ROOT / "jobs" / "quickstart.yaml").run_id
    assert set(re.findall(r"results/wml/([\w-]+)", README)) == {run_id}


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


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, migrated_store):
    """A working directory after the quickstart's command."""
    folder = tmp_path_factory.mktemp("quickstart")
    shutil.copy(migrated_store, folder)
    (folder / "jobs").symlink_to(ROOT / "jobs")
    command = [sys.executable, "-m", "wml_ray", "train", "jobs/quickstart.yaml"]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert "weighted" in done.stdout, done.stderr
    return folder


@pytest.mark.core
def test_the_quickstart_trains_every_peer(quickstart):
    (result,) = quickstart.glob("results/*/*/result.json")
    peers = json.loads(result.read_text())["peers"]
    assert len({peer["params"] for peer in peers}) == 4
    assert all(peer["test_accuracy"] >= 0.95 for peer in peers)


@pytest.mark.core
def test_the_way_from_the_quickstart_to_http_works_as_the_readme_prints_it(quickstart):
    """pick, the export that it suggests, the README's further commands, a real server and the README's curl."""
    section = README.partition("## Choose, export, serve")[2].partition("\n## ")[0]
    *lines, serve, curl = re.findall(r"^    (\S.*(?:\n        .*)*)$", section, flags=re.MULTILINE)
    environment = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(line):
        done = subprocess.run(line, shell=True, cwd=quickstart, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = [run(line) for line in lines if line.startswith("wml-ray")]
    (suggested,) = re.findall(r"^export +(wml-ray export .*)$", shown[0], flags=re.MULTILINE)
    card = re.search(r"^wrote (.*/card.json)$", run(suggested), flags=re.MULTILINE)[1]
    assert json.loads((quickstart / card).read_text())["verification"]["equal_predictions"] == 1
    port = str(free_port())
    (store,) = (line.removeprefix("export ") for line in lines if line.startswith("export "))
    assert re.search(r"&\s*(#.*)?$", serve), "the README serves in the background of the reader's shell"
    command = f"export {store}\n{serve.replace('5001', port)}\nwait $!"
    with (quickstart / "served.log").open("w") as log:
        server = subprocess.Popen(
            command, shell=True, cwd=quickstart, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline_s = time.monotonic() + DEADLINE_S
        while subprocess.run(["curl", "-sf", f"localhost:{port}/ping"], capture_output=True).returncode:
            assert server.poll() is None, (quickstart / "served.log").read_text()
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        (logits,) = json.loads(run(curl.replace("5001", port)))["predictions"]["logits"]
        assert len(logits) == 10
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


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
        faster = [f"data.cache_path={workplace}/cache", "optim.epochs=1"]
        assert main([*words, *(faster if words[0] == "train" else [])]) == 0, capsys.readouterr().err


@pytest.mark.core
@pytest.mark.usefixtures("ray_cluster")
def test_the_commands_and_the_python_of_readme_and_docs_run(workplace, capsys):
    for folder in ("jobs", "tune_spaces"):
        (workplace / folder).symlink_to(ROOT / folder)
    elsewhere = {"submit", "jobs", *ON_THE_QUICKSTART}
    lines = [words for words in commands(README) + commands(DOCS["search"]) if "s3://BUCKET" not in " ".join(words)]
    in_process = [words for words in lines if words[0] not in elsewhere]
    assert {words[0] for words in in_process} == {"plan", "train", "report", "tune", "compare"}
    for words in in_process:
        assert main([*words, *FASTER.get(words[0], [])]) == 0, capsys.readouterr().err
    space, *blocks = python_blocks(README)
    (workplace / "space.py").write_text(space)
    assert wml_ray.load_space("space.py", wml_ray.load_config("jobs/search.yaml")).objectives
    names: dict = {}
    for block in blocks:
        exec(block, names)
    (block,) = python_blocks(DOCS["choosing"])
    exec(block.replace("RUN", str(names["run"].folder)), names)
    assert list(names["run"].peers["test_accuracy"].between(0, 1)) == [True] * 4
    assert not names["network"].training
    exec(python_blocks(DOCS["adding-a-network"])[0], names)
    assert callable(names["stages"])
