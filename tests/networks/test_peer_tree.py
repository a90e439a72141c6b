import pytest
import reference
import torch
from family import SPEC, batch, enumerate_names, pruned_tree, stages
from torch import nn

from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.trunk_gradient import divide_shared_gradients


class Counting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(inputs)


def test_a_forward_pass_runs_each_copy_once():
    tree = PeerTree(lambda: {"trunk": Counting(), "middle": Counting(), "head": Counting()}, [1, 2, 4])
    logits = tree(torch.randn(5, 3))
    assert logits.shape == (4, 5, 3)
    assert [module.calls for module in tree.modules() if isinstance(module, Counting)] == [1] * 7


@pytest.mark.parametrize("sharing", [[1, 2, 4, 4], [2, 2, 4, 4], [4, 4, 4, 4], [1, 1, 1, 4], [1, 1, 1, 1]], ids=str)
def test_each_peer_sees_its_own_view_and_each_copy_runs_once(sharing):
    torch.manual_seed(0)
    tree = PeerTree(lambda: dict(enumerate_names(stages(SPEC))), sharing).double().train()
    views, _ = batch(5 * tree.num_peers)
    logits = tree(views, own_views=True)
    twin = reference.OnOwnViews(tree)(views.unflatten(0, (-1, 5)))
    torch.testing.assert_close(logits, twin, rtol=1e-12, atol=1e-12)
    features = tree.features(views, own_views=True)
    assert features.logits_MBK.equal(logits)
    assert [len(pooled) for pooled in features.pooled] == [5] * tree.num_peers
    shares = [tree.num_peers // copies for copies in sharing[:-1]]
    assert [[len(tensor) // 5 for tensor in maps] for maps in features.maps] == [
        [share] * copies for share, copies in zip(shares, sharing, strict=False)
    ]


def test_every_copy_is_initialised_afresh():
    tree = PeerTree(lambda: {"trunk": Counting(), "head": Counting()}, [1, 4])
    assert len({head.weight[0, 0].item() for head in tree.stages["head"]}) == 4


def test_a_peer_stands_alone_with_equal_outputs():
    tree = pruned_tree().eval()
    inputs, _ = batch(4)
    logits = tree(inputs)
    for index in range(tree.num_peers):
        peer = tree.peer(index)
        assert peer(inputs).equal(logits[index])
        with torch.no_grad():
            for parameter in peer.parameters():
                parameter.zero_()
    assert tree(inputs).equal(logits)


def test_peers_through_a_module_are_those_whose_path_has_it():
    tree = pruned_tree()
    for name, _ in tree.named_modules():
        if name.count(".") == 2:
            assert tree.peers_through(name) == {peer for peer in range(4) if name in tree.path(peer)}
    assert tree.peers_through("stages.stage1.1.inner.0.0.weight") == {2, 3}
    assert SPEC.num_classes == tree.peer(0)[-1][-1].out_features


def test_divided_gradients_are_the_mean_over_the_peers_below_each_copy():
    tree, (inputs, _) = pruned_tree(), batch(4)
    tree(inputs).square().sum().backward()
    sums = {name: parameter.grad.clone() for name, parameter in tree.named_parameters()}
    tree.zero_grad()
    for _ in range(2):  # a second call changes nothing
        divide_shared_gradients(tree)
    tree(inputs).square().sum().backward()
    for name, parameter in tree.named_parameters():
        torch.testing.assert_close(parameter.grad, sums[name] / len(tree.peers_through(name)))
