"""Slow twins: Eq. 1 and divergences by pairwise loops, Eq. 5 by autograd through the SGD step."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call


def kl(student, teacher, temperature, direction, stop_gradient_teacher):
    """KL(z_i, z_j) of DESIGN: z_i the student, z_j the teacher; summed over classes, mean over the batch."""
    p_student, p_teacher = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    if stop_gradient_teacher:
        p_teacher = p_teacher.detach()
    over, under = (p_teacher, p_student) if direction == "teacher_to_student" else (p_student, p_teacher)
    return temperature**2 * (over * (over.log() - under.log())).sum(-1).mean()


def inner_loss(
    logits,
    targets,
    weights,
    alpha,
    temperature=1.0,
    kl_direction="teacher_to_student",
    stop_gradient_teacher=False,
    balance="paper",
    weigh_labels=True,
    kl_share=1.0,
):
    total, peers = 0.0, len(logits)
    for i, student in enumerate(logits):
        label_weight = (weights[i] if weigh_labels else 1 / peers) * (peers if balance == "peer" else 1)
        total = total + (1 - alpha) * label_weight * F.cross_entropy(student, targets)
        for j, teacher in enumerate(logits):
            divergence = kl(student, teacher, temperature, kl_direction, stop_gradient_teacher)
            total = total + kl_share * alpha * weights[j] * divergence
    return total


def divergences_from_others(logits, temperature):
    """Of each peer, the mean of KL_T(z_i <- z_j) over the others, images and classes one by one."""
    divergences = []
    for i, student in enumerate(logits):
        total = torch.zeros((), dtype=logits.dtype)
        for j, teacher in enumerate(logits):
            if i == j:
                continue
            p, q = (teacher.detach() / temperature).softmax(-1), (student / temperature).softmax(-1)
            for image in range(len(student)):
                for label in range(student.shape[-1]):
                    total = total + p[image, label] * (p[image, label] / q[image, label]).log()
        divergences.append(temperature**2 * total / len(student) / max(len(logits) - 1, 1))
    return divergences


def ensemble_loss(logits, targets, weights):
    return F.cross_entropy(sum(w * z for w, z in zip(weights, logits, strict=True)), targets)


def forward(model, parameters, inputs):
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return list(functional_call(model, {**parameters, **buffers}, (inputs,)))


class OnOwnViews(nn.Module):
    """A tree on (M, B, ...) inputs, one view a peer, copy by copy; on (B, ...) inputs it is the tree itself."""

    def __init__(self, tree):
        super().__init__()
        self.tree = tree

    def forward(self, inputs):
        if inputs.dim() == 4:
            return self.tree(inputs)
        views = list(inputs)
        for name, copies in self.tree.stages.items():
            for index, copy in enumerate(copies):
                peers = [peer for peer in range(len(views)) if f"stages.{name}.{index}" in self.tree.path(peer)]
                outputs = copy(torch.cat([views[peer] for peer in peers]))
                for peer, output in zip(peers, outputs.split(inputs.shape[1]), strict=True):
                    views[peer] = output
        return torch.stack(views)


def unrolled_gradient(
    model, inner_shards, outer_shards, weights, alpha, unroll_learning_rate, scales=None, **kl_options
):
    """d/domega of L2(omega, theta - gamma D dL1/dtheta), D = `scales` by name or 1; each loss is the mean over the
    workers' shards.
    """
    parameters = dict(model.named_parameters())
    weights = weights.clone().requires_grad_()
    images = sum(len(y) for _, y in inner_shards)
    inner = sum(
        inner_loss(forward(model, parameters, x), y, weights, alpha, **kl_options) * len(y) / images
        for x, y in inner_shards
    )
    gradients = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
    sizes = {name: unroll_learning_rate * (scales[name] if scales else 1) for name in parameters}
    stepped = {name: p - sizes[name] * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
    images = sum(len(y) for _, y in outer_shards)
    outer = sum(ensemble_loss(forward(model, stepped, x), y, weights) * len(y) / images for x, y in outer_shards)
    return torch.autograd.grad(outer, weights)[0]
