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


def smooth_l1(errors):
    """x^2 / 2 up to 1, then |x| - 1/2, a mean over the errors."""
    total = 0.0
    for error in errors:
        total = total + (error * error / 2 if abs(error) < 1 else abs(error) - 0.5)
    return total / len(errors)


def length(vector):
    return (vector * vector).sum() ** 0.5 if bool(vector.any()) else torch.zeros((), dtype=vector.dtype)


def distances(features):
    """Distance of each ordered pair of images, over the mean of the positive ones."""
    lengths = [length(one - other) for one in features for other in features]
    positive = [value for value in lengths if value > 0]
    return [value / (sum(positive) / len(positive)) for value in lengths]


def angles(features):
    """cos of the angle at each image between each ordered pair of images; 0 where two images are the same."""
    found = []
    for corner in features:
        for one in features:
            for other in features:
                legs = length(one - corner) * length(other - corner)
                found.append(((one - corner) * (other - corner)).sum() / legs if legs > 0 else 0 * corner.sum())
    return found


def relations(student, teacher, angle_weight, distance_weight=1.0):
    teacher = teacher.detach()
    by_distance = [s - t for s, t in zip(distances(student), distances(teacher), strict=True)]
    by_angle = [s - t for s, t in zip(angles(student), angles(teacher), strict=True)]
    return distance_weight * smooth_l1(by_distance) + angle_weight * smooth_l1(by_angle)


def rkd(method, outputs, targets, context):
    settings, total = method.settings, 0.0
    for i, student in enumerate(outputs["logits_MBK"]):
        total = total + cross_entropy(student, targets)
        pair = (outputs[f"pooled{i}"], outputs["teacher_pooled"])
        total = total + relations(*pair, settings.angle_weight, settings.distance_weight)
    return total


def fitnets(method, outputs, targets, context):
    total = independent(method, outputs, targets, context)
    for copy in range(len(method.tree.stages[f"stage{2 if method.settings.stage is None else method.settings.stage}"])):
        errors = (outputs[f"hint{copy}"] - outputs["teacher_map"].detach()).flatten()
        total = total + method.settings.weight * sum(error * error for error in errors) / len(errors)
    return total


def ctsl_mkt(method, outputs, targets, context):
    peers, settings, total = list(outputs["logits_MBK"]), method.settings, 0.0
    for i, student in enumerate(peers):
        total = total + cross_entropy(student, targets)
        for j, teacher in enumerate(peers):
            if j != i:
                pair = relations(outputs[f"pooled{i}"], outputs[f"pooled{j}"], settings.angle_weight)
                pair = pair + divergence(student, teacher.detach(), 1.0)
                total = total + settings.mutual_weight * pair / (len(peers) - 1)
        before = outputs["teacher_MBK"][i]
        total = total + settings.self_weight * divergence(student, before, settings.temperature)
    return total


def one(method, outputs, targets, context):
    peers, settings = list(outputs["logits_MBK"]), method.settings
    mixture = []
    for image, gate in enumerate(outputs["gate_BM"]):
        mixture.append(sum(share * peer[image] for share, peer in zip(gate, peers, strict=True)))
    total = cross_entropy(torch.stack(mixture), targets)
    for student in peers:
        taught = divergence(student, torch.stack(mixture).detach(), settings.temperature)
        weight = settings.weight * ramp(context, settings.ramp)
        total = total + cross_entropy(student, targets) + weight * taught
    return total


def okddip(method, outputs, targets, context):
    peers, settings = list(outputs["logits_MBK"]), method.settings
    leader = len(peers) - 1 if settings.leader is None else settings.leader
    others = [peer for peer in range(len(peers)) if peer != leader]
    pooled = list(outputs["pooled_BC"].split(method.widths, dim=1))
    stop = (lambda tensor: tensor.detach()) if settings.stop_gradient_teacher else (lambda tensor: tensor)
    weight = settings.weight * ramp(context, settings.ramp)
    total = independent(method, outputs, targets, context)
    for a, student in enumerate(others):
        mixed = []
        for image in range(len(targets)):
            query = method.query[str(method.widths[a])].weight @ pooled[a][image]
            keys = [method.key[str(method.widths[b])].weight @ pooled[b][image] for b in range(len(others))]
            attention = probabilities(torch.stack([(query * key).sum() for key in keys]))
            mixed.append(sum(share * stop(peers[b][image]) for share, b in zip(attention, others, strict=True)))
        total = total + weight * divergence(peers[student], torch.stack(mixed), settings.temperature)
    target = stop(mean([peers[b] for b in others]))
    return total + weight * divergence(peers[leader], target, settings.temperature)


def pcl(method, outputs, targets, context):
    peers, settings = list(outputs["logits_MBK"]), method.settings
    weight = settings.weight * ramp(context, settings.ramp)
    classifier, averages = outputs["classifier_BK"], list(outputs["average_MBK"])
    total = cross_entropy(classifier, targets)
    for i, student in enumerate(peers):
        total = total + cross_entropy(student, targets)
        total = total + weight * divergence(student, classifier.detach(), settings.temperature)
        for j, teacher in enumerate(averages):
            if j != i:
                pair = divergence(student, teacher.detach(), settings.temperature)
                total = total + weight * pair / (len(peers) - 1)
    return total


def ffl(method, outputs, targets, context):
    peers, fused, settings = list(outputs["logits_MBK"]), outputs["fused_BK"], method.settings
    weight = settings.weight * ramp(context, settings.ramp)
    total = independent(method, outputs, targets, context) + cross_entropy(fused, targets)
    for student in peers:
        total = total + weight * divergence(student, fused.detach(), settings.temperature)
    return total + weight * divergence(fused, mean(peers).detach(), settings.temperature)


def attention(maps):
    """Mean square over channels of each image, position by position, in one list."""
    return [
        torch.stack([(image[:, y, x] ** 2).mean() for y in range(image.shape[1]) for x in range(image.shape[2])])
        for image in maps
    ]


def unit_distance(ones, others):
    """Mean squared difference of the images of two lists, each scaled to length 1."""
    errors = []
    for one, other in zip(ones, others, strict=True):
        errors += list(one.flatten() / length(one.flatten()) - other.flatten() / length(other.flatten()))
    return sum(error * error for error in errors) / len(errors)


def diversity_distance(ones, others):
    """As `unit_distance`, from the others with all entries above the lowest third turned over."""
    errors = []
    for one, other in zip(ones, others, strict=True):
        size = length(other)
        scaled = other / size
        threshold = sorted(scaled.tolist())[max(len(scaled) // 3, 1) - 1]
        for entry, target in zip(one / length(one), scaled, strict=True):
            if target > threshold:
                target = size - target
            elif target == threshold:
                target = size / 2
            errors.append(entry - target)
    return sum(error * error for error in errors) / len(errors)


def ffsd(method, outputs, targets, context):
    peers, fused, settings = list(outputs["logits_MBK"]), outputs["fused_BK"], method.settings
    leader = len(peers) - 1 if settings.leader is None else settings.leader
    students = [peer for peer in range(len(peers)) if peer != leader]
    sharing, share = method.tree.sharing, ramp(context, settings.ramp)

    def at(stage, peer):
        return outputs[f"map{stage}_{peer * sharing[stage] // len(peers)}"]

    total = independent(method, outputs, targets, context) + cross_entropy(fused, targets)
    taught = divergence(fused, mean([peers[a] for a in students]).detach(), settings.temperature)
    taught = taught + divergence(peers[leader], fused.detach(), settings.temperature)
    for a in students:
        for b in students:
            if b != a:
                pair = divergence(peers[a], peers[b].detach(), settings.temperature)
                taught = taught + pair / (len(students) - 1)
    maps = unit_distance(attention(at(2, leader)), attention(outputs["fused_map"].detach()))
    all_last = torch.cat([at(2, a).detach() for a in students], dim=1)  # no copy of the last stage is shared here
    maps = maps + unit_distance(attention(outputs["expanded_map"]), attention(all_last))
    maps = maps + unit_distance(attention(at(1, leader)), attention(outputs[f"target{leader}_1"].detach()))
    diversity, errors = 0.0, 0.0
    for place, a in enumerate(students[1:]):
        diversity = diversity + diversity_distance(attention(at(2, a)), attention(at(2, students[place]).detach()))
        diversity = diversity + unit_distance(attention(at(1, a)), attention(outputs[f"target{a}_1"].detach()))
    for peer in [*students[1:], leader]:
        decoded, own = outputs[f"decoded{peer}_1"], at(1, peer).detach()
        errors = errors + unit_distance(decoded, own) + unit_distance(attention(decoded), attention(own))
    weighted = settings.diversity_weight * diversity + settings.map_weight * maps + settings.decoder_weight * errors
    return total + settings.weight * taught + share * weighted


def self_distillation(method, outputs, targets, context):
    *early, last = list(outputs["logits_MBK"])
    settings, total = method.settings, cross_entropy(last, targets)
    for i, exit_logits in enumerate(early):
        total = total + settings.label_weight * cross_entropy(exit_logits, targets)
        taught = divergence(exit_logits, last.detach(), settings.temperature)
        total = total + settings.divergence_weight * taught
        errors = (outputs[f"adapted{i}"] - outputs["last_BD"].detach()).flatten()
        total = total + settings.feature_weight * sum(error * error for error in errors) / len(targets)
    return total


def boc_kd(method, outputs, targets, context):
    peers, settings = list(outputs["logits_MBK"]), method.settings
    everyone, total = mean(peers).detach(), 0.0
    for student in peers:
        total = total + settings.label_weight * cross_entropy(student, targets)
        total = total + settings.mutual_weight * divergence(student, everyone, settings.temperature)
    for stage, copies in enumerate(method.tree.sharing[:-1]):
        for copy in range(1, copies):
            errors = (outputs[f"adapted{stage}_{copy}"] - outputs[f"map{stage}"].detach()).flatten()
            total = total + settings.map_weight * sum(error * error for error in errors) / len(errors)
    return total


TWINS = {
    "independent": independent,
    "dml": dml,
    "cl_ilr": cl_ilr,
    "kdcl": kdcl,
    "kd": kd,
    "peer_to_peer": peer_to_peer,
    "rkd": rkd,
    "fitnets": fitnets,
    "ctsl_mkt": ctsl_mkt,
    "one": one,
    "okddip": okddip,
    "pcl": pcl,
    "ffl": ffl,
    "ffsd": ffsd,
    "self_distillation": self_distillation,
    "boc_kd": boc_kd,
}
"""By method; the twins of `wml` are in tests/reference.py, as Eq. 5 needs them too."""
