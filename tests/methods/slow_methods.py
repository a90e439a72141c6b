"""A slow twin of each method's loss: loops over images, peers and classes, no log-softmax, no helper of the package.

`twin(method, outputs, targets, context)` gives the whole loss as one number. Parameters that `losses` uses
are in `method`; the results of modules that run in `forward` are in `outputs`.
"""

import math

import torch


def probabilities(logits, temperature=1.0):
    """softmax(logits / T) of one image, class by class."""
    powers = [math.e ** (logit / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def cross_entropy(logits, targets):
    """CE(z, y), a mean over images."""
    total = 0.0
    for image, label in enumerate(targets.tolist()):
        total = total - probabilities(logits[image])[label].log()
    return total / len(targets)


def divergence(student, teacher, temperature):
    """KL_T(student <- teacher), with gradient into both: T^2 sum_k p log(p / q), a mean over images."""
    total = torch.zeros((), dtype=student.dtype)
    for image in range(len(student)):
        q, p = probabilities(student[image], temperature), probabilities(teacher[image], temperature)
        for label in range(len(p)):
            total = total + p[label] * (p[label] / q[label]).log()
    return temperature**2 * total / len(student)


def ramp(context, share):
    """exp(-5 (1 - e / R)^2) up to R, then 1."""
    passed = min(context.epoch / (share * context.total_epochs), 1.0)
    return math.e ** (-5 * (1 - passed) * (1 - passed))


def mean(tensors):
    total = torch.zeros_like(tensors[0])
    for tensor in tensors:
        total = total + tensor
    return total / len(tensors)


def independent(method, outputs, targets, context):
    total = 0.0
    for logits in outputs["logits_MBK"]:
        total = total + cross_entropy(logits, targets)
    return total


def dml(method, outputs, targets, context):
    peers, settings = list(outputs["logits_MBK"]), method.settings
    total = 0.0
    for i, student in enumerate(peers):
        total = total + cross_entropy(student, targets)
        for j, teacher in enumerate(peers):
            if j != i:
                pair = divergence(student, teacher.detach(), settings.temperature)
                total = total + settings.weight * pair / (len(peers) - 1)
    return total


def cl_ilr(method, outputs, targets, context):
    peers, settings = list(outputs["logits_MBK"]), method.settings
    total = 0.0
    for i, student in enumerate(peers):
        others = mean([teacher.detach() for j, teacher in enumerate(peers) if j != i])
        total = total + (1 - settings.alpha) * cross_entropy(student, targets)
        total = total + settings.alpha * divergence(student, others, settings.temperature)
    return total


def kdcl(method, outputs, targets, context):
    peers, settings = list(outputs["logits_MBK"]), method.settings
    everyone = mean([peer.detach() for peer in peers])
    total = 0.0
    for student in peers:
        total = total + (1 - settings.alpha) * cross_entropy(student, targets)
        total = total + settings.alpha * divergence(student, everyone, settings.temperature)
    return total


def kd(method, outputs, targets, context):
    settings, total = method.settings, 0.0
    for student in outputs["logits_MBK"]:
        total = total + (1 - settings.alpha) * cross_entropy(student, targets)
        total = total + settings.alpha * divergence(student, outputs["teacher_BK"], settings.temperature)
    return total


def peer_to_peer(method, outputs, targets, context):
    teacher, *students = list(outputs["logits_MBK"])
    settings = method.settings
    total = cross_entropy(teacher, targets)
    for i, student in enumerate(students):
        total = total + cross_entropy(student, targets)
        total = total + settings.teacher_weight * divergence(student, teacher.detach(), settings.temperature)
        for j, other in enumerate(students):
            if j != i:
                pair = divergence(student, other.detach(), settings.temperature)
                total = total + settings.mutual_weight * pair / (len(students) - 1)
    return total


TWINS = {
    "independent": independent,
    "dml": dml,
    "cl_ilr": cl_ilr,
    "kdcl": kdcl,
    "kd": kd,
    "peer_to_peer": peer_to_peer,
}
"""By method; the twins of `wml` are in tests/reference.py, as Eq. 5 needs them too."""
