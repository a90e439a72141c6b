"""The configs in jobs/: each loads, has a comment, and gives a tree that can be built and pruned."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from wml_ray.cli.main import main
from wml_ray.cli.options import compare_settings, parse_arguments
from wml_ray.config.load import known_keys, load_config
from wml_ray.config.schema import Config
from wml_ray.report.comparison_tables import published_rows

JOBS = Path(__file__).parent.parent / "jobs"
CONFIGS = sorted(path.stem for path in JOBS.glob("*.yaml"))
PAPER = [name for name in CONFIGS if name.startswith(("cifar", "imagenet"))]
COMPARISONS = [name for name in CONFIGS if name.startswith("compare_")]
DATASETS = {"digits": "digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagefolder": "ImageNet"}
BACKBONES = {
    **{f"resnet{depth}{stem}": f"ResNet-{depth}" for depth in (18, 20, 32, 50, 56, 101) for stem in ("", "_cifar")},
    "mobilenet_v2": "MobileNetV2",
}
CLASSES_OF_IMAGENET = 1000
TIERS = {name: pytest.mark.nightly for name in CONFIGS if re.search("resnet(50|101)$", name)}
TIERS["imagenet_mobilenet_v2"] = pytest.mark.slow


def read(name):
    """A config and the comment at its top."""
    path = JOBS / f"{name}.yaml"
    comment = re.match(r"(#.*\n)+", path.read_text())
    assert comment, "does not start with a comment"
    return load_config(path), comment.group()


def names(comment, thing):
    return re.search(rf"(?<![\w-]){thing}(?![\w-])", comment)


def test_every_table_of_the_paper_has_a_config_and_a_comparison():
    assert {name.removeprefix("compare_") for name in COMPARISONS} == set(PAPER)
    assert set(PAPER) == {
        *("cifar100_resnet101", "cifar100_resnet18", "cifar100_resnet50"),
        *("cifar10_resnet18", "cifar10_resnet32", "cifar10_resnet50", "cifar10_resnet56"),
        "imagenet_mobilenet_v2",
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_loads_and_its_comment_names_the_dataset(name):
    config, comment = read(name)
    assert names(comment, DATASETS[config.data.name])


@pytest.mark.parametrize("name", PAPER)
def test_a_config_of_the_paper_separates_published_figures_from_ours(name):
    config, comment = read(name)
    assert names(comment, BACKBONES[config.model.backbone])
    assert re.search(r"baseline \d\d\.\d\d \| .*\d\d\.\d\d", comment)
    assert "ensemble" in comment
    assert "ours" in comment
    for other in re.findall(r"\w+\.yaml", comment):
        assert (JOBS / other).exists()


@pytest.mark.parametrize("name", PAPER)
def test_a_config_of_the_paper_leaves_out_keys_at_their_default(name):
    raw = yaml.safe_load((JOBS / f"{name}.yaml").read_text())
    given = {f"{section}.{key}" for section, keys in raw.items() for key in keys}
    assert given <= known_keys().keys()
    mine, default = (config.model_dump() for config in (read(name)[0], Config()))
    same = {
        key
        for key in given
        for section, _, inner in [key.partition(".")]
        if mine[section][inner] == default[section][inner]
    }
    assert same == set()


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_of_the_paper_is_its_config_beside_its_published_figures(name):
    config, comment = read(name)
    (command,) = re.findall(r"^# wml-ray (.*)$", comment, flags=re.MULTILINE)
    options = parse_arguments(shlex.split(command.replace("jobs/", f"{JOBS}/")))
    assert Path(options.config) == JOBS / f"{name}.yaml"
    rows = published_rows(compare_settings(options, config).published)
    assert {"baseline", "WML"} <= {row["row"] for row in rows}
    own, _ = read(name.removeprefix("compare_"))
    assert config.model_dump(exclude={"run"}) == own.model_dump(exclude={"run"})
    assert config.run.name != own.run.name


def test_the_pruned_rows_are_peers_with_the_published_shares_removed():
    for name, removed in (("cifar10_resnet32", (0, 0.244, 0.454, 0.5)), ("cifar10_resnet56", (0, 0.247, 0.417, 0.49))):
        config, comment = read(name)
        assert config.pruning.unit == "macs"
        assert config.pruning.ratios == removed
        assert all(f"({share:.1%})".replace("%", " %") in comment for share in removed[1:])


@pytest.mark.parametrize("name", ["own_backbone", "own_method"])
def test_own_code_is_found_beside_its_config_and_results_are_written_elsewhere(name, workplace, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(JOBS.iterdir())
    assert main(["train", str(JOBS / f"{name}.yaml"), "optim.epochs=1"]) == 0
    assert set(JOBS.iterdir()) - before <= {JOBS / "__pycache__"}
    assert {"results", "mlflow.db"} <= {path.name for path in workplace.iterdir()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=TIERS.get(name, ())) for name in CONFIGS if name not in COMPARISONS]
)
def test_plan_builds_the_tree_of_a_config(workplace, capsys, name):
    """The tree is that of the file, apart from the saliency, which is computed on two images."""
    config, _ = read(name)
    if config.data.name == "imagefolder":
        _imagenet(Path(config.data.root))
    assert main(["plan", str(JOBS / f"{name}.yaml"), "pruning.saliency_images=2", "data.batch_size=8"]) == 0
    shown = capsys.readouterr().out
    assert f"{config.model.backbone}, sharing {list(config.model.sharing)}" in shown


def _imagenet(root):
    """The folders of ImageNet, each with the same small image."""
    image = root / "image.png"
    root.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(image)
    for split in ("train", "val"):
        for index in range(CLASSES_OF_IMAGENET):
            folder = root / split / f"n{index:08d}"
            folder.mkdir(parents=True)
            (folder / "image.png").hardlink_to(image)
