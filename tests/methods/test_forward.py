"""What each method hands to its losses in training, and predicts: that of the tree's features and logits."""

import math

import pytest
import torch
from family import SPEC, batch, teacher_for, tree_for

from wml_ray.config.schema import Config
from wml_ray.methods.attention import attention, with_shift
from wml_ray.methods.base import StepContext
from wml_ray.methods.losses import inner_loss
from wml_ray.methods.registry import METHODS, build


def one(method, features, inputs):
    return {"gate_BM": method.gate(features.maps[0][0].flatten(2).mean(2))}  # of the stage that all share


def okddip(method, features, inputs):
    return {"pooled_BC": torch.cat(features.pooled[:3], dim=1)}


def pcl(method, features, inputs):
    averages = method.average.features(inputs, own_views=True).logits_MBK.detach()
    return {"classifier_BK": method.classifier(torch.cat(features.pooled, dim=1)), "average_MBK": averages}


def ffl(method, features, inputs):
    return {"fused_BK": method.fusion(torch.cat(features.maps[2], dim=1))}


def ffsd(method, features, inputs):
    """The decoders of students 1, 2 and of the leader 3 give the map of stage 1 from one of stage 2."""
    last, between = features.maps[2], features.maps[1]
    fused_map = method.fusion(torch.cat([tensor.detach() for tensor in last[:3]], dim=1))
    read = {peer: with_shift(last[peer], attention(last[peer - 1])) for peer in (1, 2)} | {3: fused_map}
    outputs = {"fused_map": fused_map, "fused_BK": method.classifier(fused_map)}
    outputs |= {f"target{peer}_1": method.decoders[str(peer)](read[peer], frozen=True)[0].detach() for peer in read}
    outputs |= {f"decoded{peer}_1": method.decoders[str(peer)](last[peer].detach())[0] for peer in read}
    outputs |= {f"map2_{peer}": last[peer] for peer in range(4)} | {f"map1_{copy}": between[copy] for copy in range(2)}
    return outputs | {"expanded_map": method.expansion(last[3])}


def kd(method, features, inputs):
    return {"teacher_BK": method.teacher.logits(inputs).mean(0)}


def rkd(method, features, inputs):
    (taught,) = method.teacher.features(inputs).pooled
    return {"teacher_pooled": taught} | {f"pooled{peer}": pooled for peer, pooled in enumerate(features.pooled)}


def fitnets(method, features, inputs):
    ((teacher_map,),) = method.teacher.features(inputs).maps[2:]
    pairs = zip(method.adapters, features.maps[2], strict=True)
    return {"teacher_map": teacher_map} | {f"hint{copy}": adapt(own) for copy, (adapt, own) in enumerate(pairs)}


def ctsl_mkt(method, features, inputs):
    start = torch.stack([method.teacher.tree.peer(peer)(inputs) for peer in range(4)]).detach()
    return {"teacher_MBK": start} | {f"pooled{peer}": pooled for peer, pooled in enumerate(features.pooled)}


def self_distillation(method, features, inputs):
    pairs = enumerate(zip(method.adapters, features.pooled[:3], strict=True))
    return {"last_BD": features.pooled[3]} | {f"adapted{peer}": adapter(pooled) for peer, (adapter, pooled) in pairs}


def boc_kd(method, features, inputs):
    outputs = {f"map{stage}": copies[0] for stage, copies in enumerate(features.maps)}
    for name, adapter in method.adapters.items():
        stage, number = map(int, name.split("_"))
        outputs[f"adapted{name}"] = adapter(features.maps[stage][number])
    return outputs


EXPECTED = {
    function.__name__: function
    for function in (one, okddip, pcl, ffl, ffsd, kd, rkd, fitnets, ctsl_mkt, self_distillation, boc_kd)
}
"""The outputs besides the logits of a method with a `forward` of its own, on a tree of `tree_for`."""


@pytest.mark.parametrize("name", METHODS)
def test_outputs_and_their_gradients_are_those_of_the_features(name):
    method, twin = (
        build(name, tree_for(name), getattr(Config(), name), SPEC, 0, teacher_for(name)).double() for _ in range(2)
    )
    inputs = batch(6 * method.num_views)[0]
    outputs = method(inputs)
    features = twin.tree.features(inputs, own_views=method.own_views)
    expected = {"logits_MBK": features.logits_MBK}
    if name in EXPECTED:
        expected |= EXPECTED[name](twin, features, inputs)
    assert outputs.keys() == expected.keys()
    for output, ours in outputs.items():
        torch.testing.assert_close(ours, expected[output], rtol=1e-9, atol=1e-11, msg=output)
        for one_gradient, other in zip(_gradients(ours, method), _gradients(expected[output], twin), strict=True):
            torch.testing.assert_close(one_gradient, other, rtol=1e-7, atol=1e-9, msg=output)


def _gradients(output, method):
    """The gradients of a fixed random combination of an output's entries by all parameters."""
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    if not output.requires_grad:
        return [torch.zeros_like(parameter) for parameter in parameters]
    combination = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype)
    loss = (output * combination).sum()
    return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)


PREDICTED = {
    "wml": lambda z: {"ensemble_weighted": 0.1 * z["logits_MBK"][0] + 0.9 * z["logits_MBK"][3]},
    "one": lambda z: {"ensemble_gate": sum(z["gate_BM"][:, [i]] * z["logits_MBK"][i] for i in range(4))},
    "okddip": lambda z: {
        "leader": z["logits_MBK"][1],
        "ensemble_peers": (z["logits_MBK"][0] + z["logits_MBK"][2] + z["logits_MBK"][3]) / 3,
    },
    "pcl": lambda z: {"ensemble_classifier": z["classifier_BK"]},
    "ffl": lambda z: {"fused": z["fused_BK"]},
    "ffsd": lambda z: {"leader": z["logits_MBK"][1], "fused": z["fused_BK"]},
}
"""The predictions besides peers and average ensemble, with peer 1 as the leader."""


@pytest.mark.parametrize("name", METHODS)
def test_predictions_are_those_of_the_outputs(name):
    settings = getattr(Config(), name)
    if hasattr(settings, "leader"):
        settings = settings.model_copy(update={"leader": 1})
    method = build(name, tree_for(name), settings, SPEC, 0, teacher_for(name)).double().eval()
    if name == "wml":
        method.log_weights_M.copy_(torch.tensor([0.1, 0.0, 0.0, 0.9]).log())
    outputs = method(batch(6)[0])
    expected = PREDICTED[name](outputs) if name in PREDICTED else {}
    torch.testing.assert_close(method.predictions(outputs), expected)


def test_the_ramp_of_wml_raises_the_kl_term_of_its_loss():
    settings = Config().wml.model_copy(update={"ramp": 0.4})
    method, (inputs, targets) = build("wml", tree_for("wml"), settings, SPEC, 0).double(), batch(6)
    outputs, early = method(inputs), StepContext(step=3, epoch=1, total_epochs=10, learning_rate=0.1)
    expected = inner_loss(outputs["logits_MBK"], targets, method.weights_M, settings, math.exp(-5 * (1 - 1 / 4) ** 2))
    torch.testing.assert_close(method.losses(outputs, targets, early)["inner"], expected, rtol=1e-12, atol=0)


def test_attention_of_16_bit_maps_is_taken_in_float32():
    maps = batch(6)[0].bfloat16()
    assert attention(maps).equal(attention(maps.float()))
