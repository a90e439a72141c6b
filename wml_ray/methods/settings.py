"""The settings of each method. Pydantic only: reading a config imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from wml_ray.settings import Count, NonNegative, Positive, Section, Share

MethodName = Literal["wml", "dml"]


class MethodConfig(Section):
    """The choice of the method."""

    name: MethodName = Field("wml", description="method of training; its settings are in the section of its name")


class WmlConfig(Section):
    """Weighted Mutual Learning: Eq. 1, and how omega is learned by Eqs. 5 and 7."""

    alpha: Share = Field(0.5, description="weight of mutual learning against the labels in Eq. 1")
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
    holdout_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(
        0.1, description="share of the training images kept for the outer loss when outer_data is holdout"
    )
    temperature: Positive = Field(1.0, description="temperature tau of the KL term (multiplied by tau squared)")
    kl_direction: Literal["teacher_to_student", "student_to_teacher"] = Field(
        "teacher_to_student", description="KL(p_teacher || p_student), or the other way round"
    )
    stop_gradient_teacher: bool = Field(False, description="let no gradient flow into the teaching peer")

    own_views: bool = Field(False, description="train each peer on an augmented view of its own of every image")


class DmlConfig(Section):
    """Deep Mutual Learning."""

    temperature: Positive = Field(1.0, description="temperature T of the divergences (multiplied by T squared)")
    weight: NonNegative = Field(1.0, description="weight w of the divergence from the other peers against the labels")
