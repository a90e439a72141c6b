"""One property of each method with a frozen teacher, and of the relations."""

import pytest
import torch
from family import SPEC, batch, enumerate_names, pruned_tree, stages, teacher_for
from torch import nn

from wml_ray.config.schema import Config
from wml_ray.errors import UserError
from wml_ray.methods.base import StepContext
from wml_ray.methods.registry import build
from wml_ray.methods.relations import angles, distances, relation_loss
from wml_ray.methods.settings import FitnetsConfig
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.training.teacher import FrozenTeacher

FIRST_STEP = StepContext(step=0, epoch=0, total_epochs=10, learning_rate=0.1)


def features(images=6, width=5, dtype=torch.float64):
    return torch.randn(images, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_relations_see_neither_place_nor_direction_nor_scale_nor_width():
    one = features()
    rotation, _ = torch.linalg.qr(features(8, 8))
    other = 0.3 * torch.cat([one, torch.zeros(6, 3)], 1) @ rotation + 7.0
    for relation in (distances, angles):
        assert relation_loss(relation(one), relation(other)) < 1e-20 < relation_loss(relation(one), relation(one**2))


@pytest.mark.parametrize("collapsed", [[1, 2], list(range(6))], ids=["two", "all"])
def test_equal_images_have_a_finite_gradient(collapsed):
    """Features that ReLU sets to zero are equal."""
    teacher, student = features(), features() ** 2
    student[collapsed] = 0.0
    student.requires_grad_()
    loss = sum(relation_loss(relation(student), relation(teacher)) for relation in (distances, angles))
    gradient = torch.autograd.grad(loss, student)[0]
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 100


def test_relations_of_near_images_keep_their_digits_in_float32():
    far_off = features() + 1000.0
    for relation in (distances, angles):
        torch.testing.assert_close(relation(far_off.float()).double(), relation(far_off), rtol=1e-3, atol=1e-3)


def test_kd_learns_from_the_mean_of_the_logits_of_all_peers_of_its_teacher():
    tree, (inputs, _) = pruned_tree(seed=1), batch(4)
    method = build("kd", pruned_tree(), Config().kd, SPEC, 0, FrozenTeacher(tree, {}))
    expected = torch.stack([tree.peer(peer)(inputs) for peer in range(4)]).mean(0)
    torch.testing.assert_close(method(inputs)["teacher_BK"], expected)


def test_hints_of_a_teacher_that_is_the_student_vanish_with_identity_adapters():
    """The maps of each copy are compared with those of the same stage."""
    tree, (inputs, targets) = pruned_tree((0.0, 0.0, 0.0, 0.0)).eval(), batch(4)
    for stage in (0, 1, 2):
        peer = dict(zip(tree.stages, tree.peer(0), strict=True))
        teacher = FrozenTeacher(PeerTree(lambda peer=peer: peer, [1] * 4), {})
        method = build("fitnets", tree, FitnetsConfig(stage=stage), SPEC, 0, teacher).double()
        for adapter in method.adapters:
            nn.init.dirac_(adapter.weight)
            nn.init.zeros_(adapter.bias)
        tree.eval()
        method.training = True
        outputs = method(inputs)
        torch.testing.assert_close(outputs["hint0"], outputs["teacher_map"])
        assert len(method.adapters) == tree.sharing[stage]
        assert method.losses(outputs, targets, FIRST_STEP)["hints"] >= 0


def test_hints_need_a_stage_of_both_networks_with_maps_of_the_same_size():
    def hints(stage, teacher_stages):
        chain = dict(enumerate_names(teacher_stages))
        teacher = FrozenTeacher(PeerTree(lambda: chain, [1] * len(chain)).double(), {})
        return build("fitnets", pruned_tree(), FitnetsConfig(stage=stage), SPEC, 0, teacher)

    with pytest.raises(UserError, match=r"stage = 3: the peers have 3 stages before the head, the teacher 3; name one"):
        hints(3, stages(SPEC))
    halved = [nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))]
    with pytest.raises(UserError, match=r"maps are 8x8x8, those of the teacher 4x4x4; name a stage where both"):
        hints(0, halved)
    with pytest.raises(UserError, match="the teacher 0; name one"):
        hints(None, [nn.Sequential(nn.Flatten(), nn.Linear(64, 10))])


def test_peers_of_ctsl_mkt_learn_from_each_other_and_from_their_start_without_gradient_into_a_teaching_peer():
    method = build("ctsl_mkt", pruned_tree(), Config().ctsl_mkt, SPEC, 0, teacher_for("ctsl_mkt"))
    inputs, targets = batch(4)
    outputs = method(inputs)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in outputs.items()}
    terms = method.losses(leaves, targets, FIRST_STEP)
    relations = torch.autograd.grad(terms["relations"], leaves["pooled0"], retain_graph=True)[0]
    others = {name: tensor if name == "pooled0" else tensor.detach() for name, tensor in leaves.items()}
    alone = 0.0
    for other in range(1, 4):
        pair = (leaves["pooled0"], others[f"pooled{other}"])
        alone = alone + relation_loss(*map(distances, pair)) + 2.0 * relation_loss(*map(angles, pair))
    torch.testing.assert_close(relations, torch.autograd.grad(alone / 3, leaves["pooled0"])[0])
    assert not outputs["teacher_MBK"].requires_grad


def test_a_single_peer_of_ctsl_mkt_learns_from_labels_and_its_start():
    tree, teacher = pruned_tree(), pruned_tree(seed=1)
    one, start = (PeerTree(lambda t=t: dict(zip(t.stages, t.peer(0), strict=True)), [1] * 4) for t in (tree, teacher))
    method, (inputs, targets) = build("ctsl_mkt", one, Config().ctsl_mkt, SPEC, 0, FrozenTeacher(start, {})), batch(4)
    terms = method.losses(method(inputs), targets, FIRST_STEP)
    assert terms["relations"] == terms["mutual"] == 0 < terms["self"]
