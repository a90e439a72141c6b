"""Transformers: their heads are pruned, and Eq. 5 passes through attention."""

import copy

import pytest
import reference
import torch
from family import SPEC, at_rate, batch, eq_1, run_in_evaluation
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wml_ray.config.schema import PruningConfig
from wml_ray.errors import UserError
from wml_ray.methods.hypergradient import weight_gradient
from wml_ray.networks.backbones import build_stages
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.networks.transformer import Attention
from wml_ray.pruning.prune import prune
from wml_ray.pruning.widths import apply_channel_widths

HEADS, HEAD_DIM, WIDTH = 4, 3, 8
pytestmark = pytest.mark.usefixtures("seeded")


class Embedding(nn.Conv2d):
    def forward(self, images):
        return super().forward(images).flatten(2).transpose(1, 2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        inner = HEADS * HEAD_DIM
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = Attention(nn.Linear(WIDTH, 3 * inner), nn.Linear(inner, WIDTH), HEAD_DIM)

    def forward(self, tokens):
        return tokens + self.attn(self.norm(tokens))


class Head(nn.Linear):
    def forward(self, tokens):
        return super().forward(tokens.mean(1))


def stages():
    return {"stem": Embedding(1, WIDTH, 4, 4), "layer": Block(), "head": Head(WIDTH, SPEC.num_classes)}


def pruned(ratios, sharing):
    tree = PeerTree(stages, sharing)
    whole = copy.deepcopy(tree)
    widths = prune(tree, PruningConfig(ratios=ratios, unit="params"), SPEC, [batch(8, dtype=torch.float32)])
    return tree, whole, widths


def test_whole_heads_are_removed_and_the_residual_width_stays():
    tree, whole, widths = pruned((0.1, 0.3), [1, 2, 2])
    inputs, _ = batch(4, dtype=torch.float32)
    for peer, left in enumerate((3, 2)):
        attention, before = tree.stages["layer"][peer].attn, whole.stages["layer"][peer].attn
        assert (attention.num_heads, attention.head_dim) == (left, HEAD_DIM)
        assert attention.qkv.in_features == attention.proj.out_features == WIDTH
        kept = [any(row.equal(own) for own in attention.qkv.weight) for row in before.qkv.weight[: HEADS * HEAD_DIM]]
        assert sum(kept) == left * HEAD_DIM
        with torch.no_grad():
            before.proj.weight[:, ~torch.tensor(kept)] = 0  # a head that nothing reads
        torch.testing.assert_close(
            run_in_evaluation(tree.peer(peer), inputs), run_in_evaluation(whole.peer(peer), inputs)
        )
    again = PeerTree(stages, [1, 2, 2])
    apply_channel_widths(again, widths)
    again.load_state_dict(tree.state_dict())
    assert run_in_evaluation(again, inputs).equal(run_in_evaluation(tree, inputs))


def test_the_weight_gradient_passes_through_attention():
    tree = pruned((0.1, 0.3), [1, 2, 2])[0].double().train()
    inner, outer, omega = batch(6, 1), batch(5, 2), torch.tensor([0.3, 0.7], dtype=torch.float64)
    gradient = weight_gradient(tree, inner, outer, omega, eq_1(alpha=0.4, unroll="exact"), at_rate(0.3))
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        twin = reference.unrolled_gradient(tree, [inner], [outer], omega, 0.4, 0.3)
    torch.testing.assert_close(gradient, twin, rtol=1e-9, atol=1e-11)


def test_the_size_of_images_and_patches_is_that_of_the_config():
    def tokens(spec, patch_size):
        with torch.device("meta"):
            stages = build_stages("timm:vit_tiny_patch16_224", spec, patch_size)
            return stages["stem"](torch.empty(1, *spec.shape)).shape[1]

    assert tokens(ImageSpec(3, 64, 5), None) == 1 + 4**2
    assert tokens(ImageSpec(1, 32, 5), 4) == 1 + 8**2
    with pytest.raises(
        UserError, match=r"patches of 16 pixels, which do not divide images of 40; set model.patch_size"
    ):
        build_stages("timm:vit_tiny_patch16_224", ImageSpec(3, 40, 5))
    for name in ("resnet20", "torchvision:mobilenet_v3_small"):
        with pytest.raises(UserError, match=f"model.patch_size = 4: model.backbone = '{name}' has no patches"):
            build_stages(name, SPEC, 4)


def test_a_transformer_with_other_parts_is_refused_with_the_part():
    with pytest.raises(UserError, match=r"cannot be cut into stages: .*reg_token"):
        build_stages("timm:vit_medium_patch16_reg4_gap_256", ImageSpec(3, 32, 5))


def test_a_network_without_prunable_channels_is_refused_with_the_layer_in_the_way():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6)

        def forward(self, images):
            return self.norm(self.conv(images))

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, SPEC.num_classes))
    tree = PeerTree(lambda: {"body": Scaled(), "head": head}, [1, 1])
    with pytest.raises(UserError, match=r"stages.body.0.norm \(GroupNorm\) stands in the way"):
        prune(tree, PruningConfig(ratios=(0.2,)), SPEC, [batch(4, dtype=torch.float32)])
