"""Features of a tree against what its layers were given and gave."""

import pytest
import torch
from family import SPEC, batch, pruned_tree, random_batch
from torch import nn

from wml_ray.config.schema import PruningConfig
from wml_ray.methods.base import Method
from wml_ray.networks.backbones import BACKBONES, build_stages
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.pruning.prune import prune

SMALL = ImageSpec(3, 16, 10)
FAMILIES = ("resnet20", "resnet18", "mobilenet_v2", "vgg16_bn", "densenet_bc40", "wrn_16_4")


def recorded(tree, call):
    """Outputs of the copies before the last stage and inputs of each head's last linear layer, copied as they arise."""
    outputs, inputs = {}, {}
    *body, heads = tree.stages.values()
    hooks = [
        copy.register_forward_hook(lambda _, __, output, key=(s, c): outputs.update({key: output.detach().clone()}))
        for s, copies in enumerate(body)
        for c, copy in enumerate(copies)
    ]
    for peer, head in enumerate(heads):
        linear = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
        hooks.append(
            linear.register_forward_pre_hook(lambda _, given, i=peer: inputs.update({i: given[0].detach().clone()}))
        )
    result = call()
    for hook in hooks:
        hook.remove()
    return result, outputs, inputs


@pytest.mark.parametrize(
    "name", [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.nightly) for name in BACKBONES]
)
def test_features_are_what_the_layers_of_a_pruned_tree_saw(name, seeded):
    sharing = [1, 1, *[2] * (len(build_stages(name, SMALL)) - 2)]
    tree = PeerTree(lambda: build_stages(name, SMALL), sharing)
    prune(tree, PruningConfig(ratios=(0.1, 0.3)), SMALL, [random_batch(SMALL)])
    inputs, _ = random_batch(SMALL)
    torch.manual_seed(1)  # of dropout
    logits_MBK = tree(inputs)
    torch.manual_seed(1)
    features, outputs, entering = recorded(tree, lambda: tree.features(inputs))
    assert features.logits_MBK.equal(logits_MBK)
    maps = {(s, c): tensor for s, copies in enumerate(features.maps) for c, tensor in enumerate(copies)}
    assert maps.keys() == outputs.keys()
    assert all(tensor.equal(outputs[key]) for key, tensor in maps.items())
    assert all(tensor.equal(entering[peer]) for peer, tensor in enumerate(features.pooled))
    shapes = Method.shapes(tree, SMALL)
    assert [tensor.shape[1:] for tensor in shapes.pooled] == [tensor.shape[1:] for tensor in features.pooled]
    assert tree.shared_stages == 2


def test_the_feature_of_a_head_that_is_no_sequence_is_its_input_averaged_over_positions(seeded):
    class Head(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs.amax((2, 3)))

    tree = PeerTree(lambda: {"stem": nn.Conv2d(1, 6, 3), "head": Head(6, 10)}, [1, 2])
    inputs, _ = batch(4, dtype=torch.float32)
    features = tree.features(inputs)
    assert features.logits_MBK.equal(tree(inputs))
    for pooled in features.pooled:
        torch.testing.assert_close(pooled, features.maps[0][0].mean((2, 3)))


def test_copies_of_a_stage_by_peer_and_the_stages_all_share():
    tree = pruned_tree()
    assert tree.shared_stages == 1
    names = list(tree.stages)
    for peer in range(4):
        copies = [f"stages.{name}.{tree.copy_of(stage, peer)}" for stage, name in enumerate(names)]
        assert copies == tree.path(peer)
    stages = {"a": nn.Identity(), "b": nn.Identity()}
    assert [PeerTree(lambda: stages, sharing).shared_stages for sharing in ([1, 1], [1, 3], [3, 3])] == [1, 1, 0]


def test_shapes_change_neither_mode_nor_buffers_nor_the_random_state():
    tree = pruned_tree().train()
    before, state = {name: b.clone() for name, b in tree.named_buffers()}, torch.random.get_rng_state()
    shapes = Method.shapes(tree, SPEC)
    assert shapes.logits_MBK.shape == (4, 1, 10)
    assert not shapes.logits_MBK.requires_grad
    assert tree.training
    assert all(buffer.equal(before[name]) for name, buffer in tree.named_buffers())
    assert torch.random.get_rng_state().equal(state)


def test_features_compile_as_one_graph_with_equal_gradients():
    tree, (inputs, _) = pruned_tree(), batch(4)

    def objective(features):
        return features.logits_MBK.square().sum() + sum(f.square().sum() for f in [*features.pooled, *features.maps[0]])

    compiled = torch.compile(lambda x: tree.features(x), fullgraph=True, backend="eager")
    gradients = [
        torch.autograd.grad(objective(call(inputs)), list(tree.parameters())) for call in (compiled, tree.features)
    ]
    for ours, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-10, atol=1e-12)
