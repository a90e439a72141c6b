"""A network of your own: a function from the image size and the classes to stages. own_backbone.yaml names it.

wml-ray train jobs/own_backbone.yaml
"""

from torch import nn


def three_layers(spec):
    """Three stages whose composition is the network; the last one ends in the linear layer that gives the logits.

    `spec` has `channels`, `resolution` and `num_classes`. Ray workers find this module as the driver does.
    """
    return {
        "stem": _layer(spec.channels, 16),
        "body": nn.Sequential(_layer(16, 32), nn.MaxPool2d(2), _layer(32, 64)),
        "head": nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 64, spec.num_classes)),
    }


def _layer(channels_in, channels):
    return nn.Sequential(nn.Conv2d(channels_in, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
