"""Small families for the tests."""

from pathlib import Path

import torch
from torch import nn

from wml_ray.checkpoints.checkpoint import Checkpoint
from wml_ray.config.load import parse_config
from wml_ray.config.schema import Config, PruningConfig
from wml_ray.methods.base import StepContext
from wml_ray.methods.settings import TEACHER_METHODS, WmlConfig
from wml_ray.networks.exits import exit_tree
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.pruning.prune import prune
from wml_ray.training.teacher import FrozenTeacher

SCORES = [0.1, 0.9, 0.5, 0.9, 0.2, 0.3]
SPEC = ImageSpec(1, 8, 10)
EXITS = [
    "model.backbone=family:chain_stages",
    "model.sharing=[1,1,1,1,4]",
    "model.exits=[1,2,3,4]",
    "pruning.ratios=[0.3,0.2,0.1,0.1]",
]
"""The overrides of `tiny_config` that make its peers exits of one network."""
DIVERGES = ["optim.learning_rate=100", "optim.weight_decay=10", "optim.schedule=constant"]  # parameters grow 999-fold


def stages(spec: ImageSpec) -> list[nn.Module]:
    """A backbone of four small stages with BatchNorm and a residual connection."""

    def block(width_in: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.Tanh())

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(block(8, 12), block(12, 8))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs + self.inner(inputs)

    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, spec.num_classes))
    return [block(spec.channels, 8), Residual(), block(8, 12), head]


def chain_stages(spec: ImageSpec) -> list[nn.Module]:
    """A backbone of five small stages whose maps shrink and widen."""

    def block(width_in: int, width: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width_in, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU())

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, spec.num_classes))
    return [block(spec.channels, 6, 1), block(6, 8, 1), block(8, 10, 2), block(10, 12, 1), head]


def batch(images: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(images, *SPEC.shape, generator=generator, dtype=dtype)
    return inputs, torch.randint(SPEC.num_classes, (images,), generator=generator)


def eq_1(**options: object) -> WmlConfig:
    """The settings at which WML's loss is Eq. 1 as the paper writes it."""
    paper = {"balance": "paper", "weigh_labels": True, "temperature": 1.0, "stop_gradient_teacher": False}
    return WmlConfig.model_validate({"alpha": 0.5, **paper, **options})


def at_rate(learning_rate: float) -> StepContext:
    """The first step of a run at this learning rate."""
    return StepContext(step=0, epoch=0, total_epochs=1, learning_rate=learning_rate)


def pruned_tree(ratios: tuple[float, ...] = (0.0, 0.2, 0.3, 0.4), seed: int = 0) -> PeerTree:
    """Four peers with BatchNorm, a shared trunk and different widths, in float64."""
    torch.manual_seed(seed)
    tree = PeerTree(lambda: dict(enumerate_names(stages(SPEC))), [1, 2, 4, 4])
    prune(tree, PruningConfig(ratios=list(ratios), min_channels=2), SPEC, [batch(16, dtype=torch.float32)])
    return tree.double().train()


def exits_of_one_network() -> PeerTree:
    """Four exits of one network, pruned, in float64."""
    torch.manual_seed(0)
    tree = exit_tree(lambda: dict(enumerate_names(chain_stages(SPEC))), [1, 1, 1, 1, 4], [1, 2, 3, 4], SPEC)
    ratios = PruningConfig(ratios=[0.3, 0.2, 0.1, 0.1], min_channels=2)
    prune(tree, ratios, SPEC, [batch(16, dtype=torch.float32)])
    return tree.double().train()


def tree_for(method: str) -> PeerTree:
    """Four pruned peers that the method can train."""
    return exits_of_one_network() if method == "self_distillation" else pruned_tree()


def enumerate_names(modules: list[nn.Module]) -> list[tuple[str, nn.Module]]:
    return [(f"stage{index}", module) for index, module in enumerate(modules)]


def tiny_config(*overrides: str) -> Config:
    """Digits on the tiny backbone: an epoch takes a fraction of a second."""
    raw = {
        "data": {"batch_size": 64, "crop_padding": 1},
        "model": {"backbone": "family:stages", "sharing": [1, 2, 4, 4]},
        "pruning": {"ratios": [0.0, 0.1, 0.2, 0.3], "min_channels": 2},
        "wml": {"update_every": 4},
        "optim": {"epochs": 3, "precision": "float32"},
    }
    return parse_config(raw, overrides)


def taught_by(folder: Path, method: str) -> list[str]:
    """The overrides that choose a method: exits, or the finished run in `folder` as its teacher, if it needs them."""
    overrides = [f"method.name={method}"]
    if method in TEACHER_METHODS:
        overrides += [f"teacher.run={folder}", f"teacher.peer={'null' if method == 'ctsl_mkt' else 0}"]
    if method == "self_distillation":
        overrides += EXITS
    return overrides


def teacher_for(method: str) -> FrozenTeacher:
    """A teacher in float64: four peers as those of `pruned_tree` where the method starts as them, else one network."""
    tree = pruned_tree(seed=1)
    if method != "ctsl_mkt":
        peer = dict(zip(tree.stages, tree.peer(1), strict=True))
        tree = PeerTree(lambda: peer, [1] * len(peer))
    return FrozenTeacher(tree, {})


def write_study(folder: Path, config: Config) -> None:
    """The files of `wml-ray tune c.yaml --space alpha.py`, a study of one key."""
    (folder / "c.yaml").write_text(config.to_yaml())
    (folder / "alpha.py").write_text(
        "from ray import tune\nOBJECTIVES = {'val/accuracy/ensemble_weighted': 'max'}\n"
        "def space(): return {'wml.alpha': tune.uniform(0, 0.9)}\n"
    )


def checkpoint(epoch):
    history = [
        {"epoch": e + 1, "timestamp_ms": 0, "metrics": {"val/accuracy/method": score}}
        for e, score in enumerate(SCORES[:epoch])
    ]
    tensors = {"layer.weight": torch.randn(64, 64), "count": torch.tensor(epoch)}
    return Checkpoint(epoch, tensors, {"epoch": torch.tensor(epoch)}, {"epoch": epoch, "history": history})


def random_batch(spec: ImageSpec, images: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and labels; BatchNorm turns two images into +1 and -1, where gradients vanish."""
    return torch.randn(images, *spec.shape), torch.randint(spec.num_classes, (images,))


def run_in_evaluation(network: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(inputs)
