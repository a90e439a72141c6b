"""The settings of the backbone and the tree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from wml_ray.errors import UserError, shortened
from wml_ray.settings import IMPORT_PATH, Count, Section, Text
from wml_ray.storage.files import digest_of

MAX_PEERS = 64


def _state_dict_file(value: str) -> str:
    if "://" in value:
        raise ValueError("a file is needed, no address; download it to where every worker can read it")
    if not value.endswith((".safetensors", ".pth", ".pt")):
        raise ValueError("the name of the file must end in .safetensors, .pth or .pt")
    return value


class ModelConfig(Section):
    """The backbone and the tree of its shared stages."""

    backbone: Annotated[Text, Field(pattern=IMPORT_PATH, max_length=200)] = Field(
        "resnet20",
        description="name of a backbone, a network of a library as `timm:NAME` or `torchvision:NAME`, or "
        "`package.module:function` that returns a list of stages",
    )
    patch_size: Annotated[Count, Field(le=4096)] | None = Field(
        None, description="width of the patches of a vision transformer of timm, in pixels; null is the network's own"
    )
    pretrained: Annotated[Text, AfterValidator(_state_dict_file)] | None = Field(
        None,
        description="state dict of the whole backbone (.safetensors, .pth or .pt), loaded into every copy before the "
        "pruning; the layer of the logits is new where the number of classes differs",
    )
    sharing: tuple[Annotated[Count, Field(le=MAX_PEERS)], ...] = Field(
        (1, 1, 2, 4, 4),
        min_length=1,
        max_length=100,
        description="copies of each stage, each entry a multiple of the one before; the last is the number of peers M, "
        "at most 64",
    )
    exits: tuple[Annotated[Count, Field(le=100)], ...] = Field(
        (),
        max_length=MAX_PEERS,
        description="peers as exits of one network: stages that each runs before a head of its own, increasing; with "
        "`sharing` [1, 1, 1, 1, 3], such as [2, 3, 4]; empty for a tree",
    )
    trunk_gradient: Literal["sum", "mean"] = Field(
        "sum", description="gradient of a shared copy: the sum of its peers' gradients, or their mean"
    )

    @property
    def pretrained_digest(self) -> str | None:
        """The SHA-256 of the file `pretrained`, which is the same wherever the file is moved; None without one.

        Raises:
            UserError: there is no such file.
        """
        if self.pretrained is None:
            return None
        try:
            return digest_of(Path(self.pretrained))
        except OSError as error:
            raise UserError(
                f"model.pretrained = '{self.pretrained}' cannot be read ({error.strerror}); name a file that every "
                "worker can read"
            ) from None

    @model_validator(mode="after")
    def _sharing_is_a_tree(self) -> ModelConfig:
        for stage, (above, here) in enumerate(zip(self.sharing, self.sharing[1:], strict=False), start=1):
            if here % above:
                raise ValueError(
                    f"model.sharing = {shortened(list(self.sharing))} is not a tree: entry {stage} ({here}) must be a "
                    f"multiple of the one before ({above}); such as [1, 1, 2, 4, 4], or [4, 4, 4, 4, 4] for no sharing"
                )
        return self

    @model_validator(mode="after")
    def _exits_are_of_one_network(self) -> ModelConfig:
        if not self.exits:
            return self
        exits, sharing, last = shortened(list(self.exits)), shortened(list(self.sharing)), len(self.sharing) - 1
        one_network = [*[1] * last, len(self.exits)]
        if list(self.sharing) != one_network:
            raise ValueError(
                f"model.exits = {exits} are {len(self.exits)} heads on stages of one copy each, but model.sharing = "
                f"{sharing}; set model.sharing = {shortened(one_network)}, or model.exits = [] for a tree"
            )
        if list(self.exits) != sorted(set(self.exits)) or self.exits[-1] > last:
            raise ValueError(
                f"model.exits = {exits} must increase, from 1 to at most {last}, the number of stages before the last "
                f"of model.sharing = {sharing}; such as {list(range(1, last + 1))[-len(self.exits) :]}"
            )
        return self
