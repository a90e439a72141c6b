"""The settings of methods with modules of their own. Pydantic only, as `settings`."""

from __future__ import annotations

from pydantic import Field

from wml_ray.settings import Count, CountOrZero, NonNegative, Section, Share, Temperature


class RampedConfig(Section):
    """A divergence from an ensemble, whose weight rises over the first epochs."""

    temperature: Temperature = Field(
        3.0, description="temperature T of the divergences (multiplied by T squared), from 0.01 to 100"
    )
    weight: NonNegative = Field(1.0, description="weight w of the divergences against the labels")
    ramp: Share = Field(
        0.2667, description="share of the epochs in which the weight of the divergences rises to w; 0 starts at w"
    )


class OneConfig(RampedConfig):
    """On-the-fly Native Ensemble."""


class OkddipConfig(RampedConfig):
    """Online Knowledge Distillation with Diverse Peers."""

    leader: CountOrZero | None = Field(
        None, description="peer that learns from the mean of the others and is deployed; null is the last"
    )
    key_width: Count | None = Field(
        None, description="width of the attention's queries and keys; null is an eighth of the widest peer's feature"
    )
    stop_gradient_teacher: bool = Field(
        False, description="let no gradient flow into the mixed logits and the leader's mean, only into the attention"
    )


class PclConfig(RampedConfig):
    """Peer Collaborative Learning."""

    decay: Share = Field(
        0.999, description="decay of the moving averages of the peers a step, at most 1 - 1 / (t + 1) at step t"
    )


class FflConfig(RampedConfig):
    """Feature Fusion Learning."""


class FfsdConfig(Section):
    """Feature Fusion and Self-Distillation: students, their fusion and a leader."""

    temperature: Temperature = Field(
        2.0, description="temperature T of the divergences (multiplied by T squared), from 0.01 to 100"
    )
    weight: NonNegative = Field(1.0, description="weight w of the divergences against the labels")
    diversity_weight: NonNegative = Field(1e-5, description="weight of the students' diversity")
    map_weight: NonNegative = Field(10.0, description="weight of the leader's distances from fused and decoded maps")
    decoder_weight: NonNegative = Field(
        1000.0, description="weight of the errors of the decoders, which alone train them"
    )
    ramp: Share = Field(
        0.0167, description="share of the epochs in which the weights of diversity, maps and decoders rise; 0: at once"
    )
    leader: CountOrZero | None = Field(
        None, description="peer that learns from the fusion of the others and is deployed; null is the last"
    )


class BocKdConfig(Section):
    """Online ensemble compression by knowledge distillation; peer 0 is the whole network."""

    temperature: Temperature = Field(
        2.0, description="temperature T of the divergence (multiplied by T squared), from 0.01 to 100"
    )
    label_weight: NonNegative = Field(0.7, description="weight a of the labels")
    map_weight: NonNegative = Field(0.15, description="weight b of the distance from the maps of peer 0")
    mutual_weight: NonNegative = Field(0.15, description="weight c of the divergence from the mean of all peers")


class SelfDistillationConfig(Section):
    """Self-distillation of the exits of one network, `model.exits`; the defaults are those of SD."""

    temperature: Temperature = Field(
        3.0, description="temperature T of the divergences (multiplied by T squared), from 0.01 to 100"
    )
    label_weight: NonNegative = Field(0.7, description="weight a of the labels of the early exits; the last exit has 1")
    divergence_weight: NonNegative = Field(
        0.0333, description="weight b of the early exits' divergences from the last exit"
    )
    feature_weight: NonNegative = Field(
        6.4e-5, description="weight c of the early exits' squared distances from the feature of the last exit"
    )
