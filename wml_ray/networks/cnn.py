"""Builders of the built-in backbones. Each returns an ordered dict of stages whose composition is the network.

A stage is any module from one tensor to one tensor; the last stage ends in the linear layer that gives the logits.
torchvision is imported only by the builders that need it: its import takes as long as that of torch.
"""

from __future__ import annotations

from torch import Tensor, nn

from wml_ray.networks.spec import ImageSpec, Stages

Activation = type[nn.ReLU] | type[nn.ReLU6]
SMALL_IMAGE = 64  # pixels; below it MobileNetV2 and VGG take their CIFAR form


def _head(channels: int, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def _kaiming(stages: Stages) -> Stages:
    for stage in stages.values():
        for module in stage.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return stages


def _conv_bn_relu(width_in: int, width: int, stride: int = 1, activation: Activation = nn.ReLU) -> nn.Sequential:
    conv = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), activation(inplace=True))


class BasicBlock(nn.Module):
    """ResNet's basic block (He et al. 2016): conv-BN-ReLU-conv-BN and a shortcut, summed before the last ReLU."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        shortcut = None
        if width_in != width:
            shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(inputs)))))
        outputs += inputs if self.downsample is None else self.downsample(inputs)
        active: Tensor = self.relu(outputs)
        return active


def cifar_resnet(spec: ImageSpec, *, depth: int) -> Stages:
    """He et al. 2016, section 4.2, with 1x1 convolution shortcuts (option B) where the width changes."""
    blocks = (depth - 2) // 6
    stages: Stages = {"stem": _conv_bn_relu(spec.channels, 16)}
    width_in = 16
    for index, width in enumerate((16, 32, 64)):
        layer = nn.Sequential()
        for block in range(blocks):
            stride = 2 if index and not block else 1
            layer.append(BasicBlock(width_in, width, stride))
            width_in = width
        stages[f"layer{index + 1}"] = layer
    stages["head"] = _head(64, spec.num_classes)
    return _kaiming(stages)


def resnet(spec: ImageSpec, *, name: str, cifar_stem: bool) -> Stages:
    """torchvision's ResNet `name`; with `cifar_stem`, a 3x3 convolution of stride 1 replaces its stem."""
    from torchvision.models import get_model

    network = get_model(name, weights=None, num_classes=spec.num_classes)
    if cifar_stem:
        stem: nn.Module = _conv_bn_relu(spec.channels, 64)
    else:
        conv = nn.Conv2d(spec.channels, 64, 7, stride=2, padding=3, bias=False)
        stem = nn.Sequential(conv, network.bn1, network.relu, network.maxpool)
    stages: Stages = {"stem": stem, "layer1": network.layer1, "layer2": network.layer2, "layer3": network.layer3}
    stages |= {"layer4": network.layer4, "head": nn.Sequential(network.avgpool, nn.Flatten(), network.fc)}
    _kaiming({"stem": stem})
    return stages


def mobilenet_v2(spec: ImageSpec) -> Stages:
    """Under 64 pixels the first three reductions are left out, as is usual on CIFAR."""
    from torchvision.models import MobileNetV2

    small = spec.resolution < SMALL_IMAGE
    stride = 1 if small else 2
    settings = [  # expansion, channels, blocks, stride of the first (Sandler et al. 2018, table 2)
        *([1, 16, 1, 1], [6, 24, 2, stride], [6, 32, 3, stride], [6, 64, 4, 2]),
        *([6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]),
    ]
    network = MobileNetV2(num_classes=spec.num_classes, inverted_residual_setting=settings)
    features = list(network.features)
    features[0] = _conv_bn_relu(spec.channels, 32, stride, nn.ReLU6)
    stages: Stages = {"stem": nn.Sequential(*features[:2])}
    for index, (first, last) in enumerate(((2, 4), (4, 7), (7, 14), (14, 19))):
        stages[f"layer{index + 1}"] = nn.Sequential(*features[first:last])
    stages["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), network.classifier)
    _kaiming({"stem": stages["stem"]})
    return stages


def vgg16_bn(spec: ImageSpec) -> Stages:
    """Five blocks of 3x3 convolutions; a block halves the image unless it has a single pixel left."""
    stages: Stages = {}
    channels, side = spec.channels, spec.resolution
    for index, (width, convs) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        block = nn.Sequential()
        for _ in range(convs):
            block.append(_conv_bn_relu(channels, width))
            channels = width
        if side >= 2:
            block.append(nn.MaxPool2d(2))
            side //= 2
        stages[f"block{index + 1}"] = block
    stages["head"] = _head(512, spec.num_classes) if spec.resolution < SMALL_IMAGE else _vgg_classifier(spec)
    return _kaiming(stages)


def _vgg_classifier(spec: ImageSpec) -> nn.Module:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(7),
        nn.Flatten(),
        *(nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()),
        nn.Linear(4096, spec.num_classes),
    )


def densenet_bc(spec: ImageSpec, *, depth: int) -> Stages:
    """Huang et al. 2017 for CIFAR: growth rate 12, bottlenecks, compression 0.5, three dense blocks."""
    from torchvision.models import DenseNet

    layers = (depth - 4) // 6
    network = DenseNet(growth_rate=12, block_config=(layers,) * 3, num_init_features=24, num_classes=spec.num_classes)
    features = network.features
    stem = nn.Conv2d(spec.channels, 24, 3, padding=1, bias=False)
    stages: Stages = {"stem": stem}
    for index in (1, 2):
        block, transition = features.get_submodule(f"denseblock{index}"), features.get_submodule(f"transition{index}")
        stages[f"block{index}"] = nn.Sequential(block, transition)
    stages["block3"] = nn.Sequential(features.get_submodule("denseblock3"), features.get_submodule("norm5"), nn.ReLU())
    stages["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), network.classifier)
    _kaiming({"stem": stem})
    return stages


class PreActivationBlock(nn.Module):
    """Wide ResNet's basic block (Zagoruyko & Komodakis 2016): BN-ReLU-conv twice, shortcut from the first ReLU."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.relu = nn.ReLU()
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if width_in != width else None

    def forward(self, inputs: Tensor) -> Tensor:
        active = self.relu(self.bn1(inputs))
        outputs: Tensor = self.conv2(self.relu(self.bn2(self.conv1(active))))
        return outputs + (inputs if self.shortcut is None else self.shortcut(active))


def wide_resnet(spec: ImageSpec, *, depth: int, widen: int) -> Stages:
    """Zagoruyko & Komodakis 2016, without dropout."""
    blocks = (depth - 4) // 6
    stages: Stages = {"stem": nn.Conv2d(spec.channels, 16, 3, padding=1, bias=False)}
    width_in = 16
    for index, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
        layer = nn.Sequential()
        for block in range(blocks):
            layer.append(PreActivationBlock(width_in, width, 2 if index and not block else 1))
            width_in = width
        stages[f"layer{index + 1}"] = layer
    stages["head"] = nn.Sequential(nn.BatchNorm2d(width_in), nn.ReLU(), _head(width_in, spec.num_classes))
    return _kaiming(stages)
