"""The settings of each method. Pydantic only: reading a config imports no torch."""

from __future__ import annotations

import math
import re
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from wml_ray.errors import shortened
from wml_ray.settings import Address, Count, CountOrZero, NonNegative, Section, Share, Temperature

METHOD_NAMES = (
    "wml",
    "independent",
    "dml",
    "cl_ilr",
    "one",
    "okddip",
    "pcl",
    "ffl",
    "ffsd",
    "kdcl",
    "kd",
    "peer_to_peer",
    "rkd",
    "fitnets",
    "ctsl_mkt",
    "self_distillation",
    "boc_kd",
)
TEACHER_METHODS = ("kd", "rkd", "fitnets", "ctsl_mkt")
"""The methods with a frozen teacher."""
FAMILY_TEACHER_METHODS = ("ctsl_mkt",)
"""Those whose peers go on from all peers of the teacher."""
FEWEST_OUTER_IMAGES = 8  # for the statistics of BatchNorm, where a batch has as many


def is_own_method(name: str) -> bool:
    """Whether a method is a user's own, `package.module:Class`."""
    return ":" in name


def _method_name(name: str) -> str:
    if name in METHOD_NAMES or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        return name
    close = get_close_matches(name[:100], METHOD_NAMES, n=1, cutoff=0.6)
    meant = f"; did you mean '{close[0]}'?" if close else ""
    raise ValueError(
        f"method.name = {shortened(repr(name))} is unknown{meant}; allowed: {', '.join(METHOD_NAMES)}, or your own as "
        "package.module:Class"
    )


class MethodConfig(Section):
    """The choice of the method, and the settings of a user's own."""

    name: Annotated[str, AfterValidator(_method_name)] = Field(
        "wml",
        description=f"method of training: {', '.join(f'`{name}`' for name in METHOD_NAMES)}, with its settings in the "
        "section of its name; or your own as `package.module:Class`",
    )
    settings: dict[str, Any] = Field({}, description="settings of your own method; no other method reads them")


class TeacherConfig(Section):
    """The frozen teacher of a method of `TEACHER_METHODS`; no other method reads it."""

    run: Address | None = Field(
        None, description="finished run that teaches: its folder or address, or its run id below `run.storage_path`"
    )
    peer: CountOrZero | None = Field(0, description="peer of `teacher.run` that teaches; null is the mean of all")
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = Field(
        None, max_length=200, description="your own network as the teacher: `package.module:function` that returns it"
    )

    @property
    def run_id(self) -> str | None:
        """The last part of `run`, which is the same wherever the run is moved."""
        return self.run and self.run.rstrip("/").rpartition("/")[2]

    def check(self, method: str) -> None:
        """Check that a method which needs a teacher has one.

        Raises:
            ValueError: it has none or two.
        """
        if method not in TEACHER_METHODS:
            return
        if self.run is None and self.function is None:
            raise ValueError(
                f"method.name = {method} needs a teacher: set teacher.run to the folder or id of a finished run, or "
                "teacher.function to package.module:function"
            )
        if self.run is not None and self.function is not None:
            raise ValueError("teacher.run and teacher.function are both set; set one to null")


def unused_sections(method: str) -> set[str]:
    """The sections that have no effect with this method: those of other methods, and `teacher` where it has none."""
    others = set(METHOD_NAMES) - {method}
    return others if method in TEACHER_METHODS else others | {"teacher"}


def has_effect(key: str, method: str) -> bool:
    """Whether a run with this method reads the config key `key`."""
    if key.startswith("method.settings"):
        return is_own_method(method)
    return key.partition(".")[0] not in unused_sections(method)


class WmlConfig(Section):
    """Weighted Mutual Learning: Eq. 1, and how omega is learned by Eqs. 5 and 7."""

    alpha: Share = Field(0.2, description="weight of mutual learning against the labels in Eq. 1")
    balance: Literal["peer", "paper"] = Field(
        "peer",
        description="weight of each label loss: `paper` is (1 - alpha) omega_i, as in Eq. 1; `peer` is M times that, "
        "so that alpha and the learning rate mean the same for any number of peers",
    )
    weigh_labels: bool = Field(
        False,
        description="weigh each peer's label loss by omega, as in Eq. 1; false: only teachers and ensemble",
    )
    ramp: Share = Field(
        0.0, description="share of the epochs in which the weight of the KL term rises to alpha; 0 starts at alpha"
    )
    weights: Literal["learned", "fixed"] = Field(
        "learned", description="learn the peer weights omega by Eqs. 5 and 7, or keep them equal"
    )
    mirror_step_size: NonNegative = Field(0.1, description="mirror-descent step size eta of Eq. 7")
    update_every: Count = Field(20, description="training steps T between two updates of the peer weights")
    unroll_learning_rate: NonNegative | None = Field(
        None, description="gamma of Eq. 5, the SGD step in the gradient of omega; null is the current learning rate"
    )
    unroll: Literal["same_point", "exact"] = Field(
        "same_point", description="point of dL2/dtheta in Eq. 5: theta, or theta after the SGD step, which is exact"
    )
    outer_data: Literal["train", "holdout"] = Field(
        "train", description="images of the outer loss: training images, or a slice kept out of training"
    )
    outer_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.25,
        description="images of a batch of the outer loss, as a share of `data.batch_size`, at least 8 where it is as "
        "many; an update costs about 1.1 + outer_share training steps; a larger share has less noise, and is "
        "for many workers, each of which takes BatchNorm statistics of its own part",
    )
    holdout_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(
        0.1, description="share of the training images kept for the outer loss when outer_data is holdout"
    )
    temperature: Temperature = Field(
        3.0, description="temperature tau of the KL term (multiplied by tau squared), from 0.01 to 100"
    )
    kl_direction: Literal["teacher_to_student", "student_to_teacher"] = Field(
        "teacher_to_student", description="KL(p_teacher || p_student), or the other way round"
    )
    stop_gradient_teacher: bool = Field(True, description="let no gradient flow into the teaching peer")

    own_views: bool = Field(False, description="train each peer on an augmented view of its own of every image")

    def outer_images(self, batch_size: int) -> int:
        """The number of images of an outer batch, of training batches of `batch_size`."""
        return min(max(math.ceil(self.outer_share * batch_size), FEWEST_OUTER_IMAGES), batch_size)


class IndependentConfig(Section):
    """Independent training: nothing to set."""


class DmlConfig(Section):
    """Deep Mutual Learning."""

    temperature: Temperature = Field(
        1.0, description="temperature T of the divergences (multiplied by T squared), from 0.01 to 100"
    )
    weight: NonNegative = Field(1.0, description="weight w of the divergence from the other peers against the labels")


class ClIlrConfig(Section):
    """Collaborative learning with intermediate-level representation sharing."""

    temperature: Temperature = Field(
        2.0, description="temperature T of the divergence (multiplied by T squared), from 0.01 to 100"
    )
    alpha: Share = Field(0.5, description="weight of the divergence from the mean of the other peers; labels 1 - alpha")


class KdclConfig(Section):
    """Online Knowledge Distillation via Collaborative Learning."""

    temperature: Temperature = Field(
        4.0, description="temperature T of the divergence (multiplied by T squared), from 0.01 to 100"
    )
    alpha: Share = Field(0.5, description="weight of the divergence from the mean of all peers; labels 1 - alpha")


class KdConfig(Section):
    """Knowledge distillation from a frozen teacher."""

    temperature: Temperature = Field(
        4.0, description="temperature T of the divergence (multiplied by T squared), from 0.01 to 100"
    )
    alpha: Share = Field(0.9, description="weight of the divergence from the teacher; labels 1 - alpha")


class PeerToPeerConfig(Section):
    """A teacher, peer 0, trained beside students that also learn from each other."""

    temperature: Temperature = Field(
        4.0, description="temperature T of the divergences (multiplied by T squared), from 0.01 to 100"
    )
    teacher_weight: NonNegative = Field(0.2, description="weight a of the divergence from the teacher, peer 0")
    mutual_weight: NonNegative = Field(0.2, description="weight b of the divergence from the other students")


class RkdConfig(Section):
    """Relational knowledge distillation from a frozen teacher."""

    distance_weight: NonNegative = Field(25.0, description="weight a of the distances between images")
    angle_weight: NonNegative = Field(50.0, description="weight b of the angles between images")


class FitnetsConfig(Section):
    """Hints from a frozen teacher."""

    weight: NonNegative = Field(1.0, description="weight w of the error of the maps against the labels")
    stage: CountOrZero | None = Field(
        None,
        description="stage, counted from 0, whose maps imitate the teacher's; null is the last before the head",
    )


class CtslMktConfig(Section):
    """Mutual learning of relations and logits beside self-learning from an independent run."""

    mutual_weight: NonNegative = Field(1.0, description="weight b of relations and divergences between the peers")
    angle_weight: NonNegative = Field(2.0, description="weight a of the angles in the relations; distances have 1")
    self_weight: NonNegative = Field(1.0, description="weight c of the divergence from the peer as the run began")
    temperature: Temperature = Field(
        4.0, description="temperature T of that divergence (multiplied by T squared), from 0.01 to 100"
    )
