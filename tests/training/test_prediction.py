"""The predicted step of several workers, against cases computed by hand and the buckets of DistributedDataParallel."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from family import SPEC, tiny_config
from torch.nn.parallel import DistributedDataParallel

from wml_ray.checkpoints.load import build_tree
from wml_ray.cli.main import main
from wml_ray.config.load import parse_config
from wml_ray.methods.base import Method
from wml_ray.methods.wml import Wml
from wml_ray.settings import Section
from wml_ray.training.prediction import Network, exposed_s, gradient_buckets
from wml_ray.verbs.plan import plan


def test_a_ring_sends_twice_all_bytes_but_one_share_in_messages_one_after_another():
    network = Network(workers=4, bandwidth_gbit=8.0, latency_s=1e-3)  # 1e9 bytes a second
    assert network.all_reduce_s(4e8) == pytest.approx(6 * (0.1 + 1e-3))
    assert network.all_gather_s(1e8) == pytest.approx(3 * (0.1 + 1e-3))


@pytest.mark.parametrize(
    ("buckets", "backward_s", "exposed"),
    [
        ([100, 300], 0.0, 0.4),  # nothing to overlap with
        ([100, 300], 1.0, 0.3),  # the first is ready after 0.25 s and all-reduced when the last is ready
        ([800, 100], 0.9, 0.8),  # the first is ready after 0.8 s and all-reduced after 1.6 s, the last waits for it
        ([400], 5.0, 0.4),  # a single bucket overlaps with nothing
    ],
)
def test_only_buckets_before_the_last_overlap_with_the_backward_pass(buckets, backward_s, exposed):
    network = Network(workers=2, bandwidth_gbit=8.0, latency_s=0.0)
    assert exposed_s([size * 10**6 for size in buckets], backward_s, network) == pytest.approx(exposed)


def test_the_predicted_buckets_are_those_of_distributed_data_parallel(tmp_path):
    method = Method(build_tree(parse_config({}), SPEC), Section(), SPEC)
    seen = []

    def record(_, bucket):
        seen.append(bucket.buffer().nbytes)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(method, gradient_as_bucket_view=True)
        model.register_comm_hook(None, record)
        for _ in range(2):  # the buckets of the first pass are others
            seen.clear()
            model(torch.randn(2, *SPEC.shape))["logits_MBK"].sum().backward()
    finally:
        dist.destroy_process_group()
    assert len(seen) > 1
    assert seen == gradient_buckets(method)


def test_the_parts_of_a_predicted_step_add_up_and_grow_as_the_bandwidth_falls():
    options = ["scale.workers=4", "scale.cpus_per_worker=1", "optim.sync_batchnorm=true"]
    predicted = [plan(tiny_config(*options), bandwidth_gbit=gbit) for gbit in (1.0, 0.1)]
    for planned in predicted:
        step, update = planned.step, planned.step.update
        assert (step.images, update.every, step.gradient_bytes) == (16, 4, 4 * planned.tree_params)
        assert min(step.compute_s, step.statistics_s, update.compute_s, update.all_reduce_s) > 0
        every_step_s = step.compute_s + step.exposed_s + step.statistics_s
        assert 4 * step.step_s == pytest.approx(4 * every_step_s + update.compute_s + update.all_reduce_s)
    for fast, slow in pairwise(planned.step for planned in predicted):
        assert fast.gradient_s < slow.gradient_s < 10 * fast.gradient_s  # the latency stays
        assert fast.statistics_s < slow.statistics_s


def test_the_exact_update_of_omega_all_reduces_twice():
    config = tiny_config("scale.workers=2", "scale.cpus_per_worker=1")
    once, twice = (plan(config, bandwidth_gbit=1.0, **{"wml.unroll": how}).step for how in ("same_point", "exact"))
    assert twice.update.all_reduce_s == 2 * once.update.all_reduce_s


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_and_an_update_are_timed_in_the_precision_of_the_run(precision, monkeypatch):
    told = set()
    monkeypatch.setattr(Wml, "after_step", lambda self, context, *batches: told.add(context.precision))
    plan(tiny_config("scale.workers=2", f"optim.precision={precision}"), bandwidth_gbit=1.0)
    assert told == {precision}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bandwidth-gbit", "1"], "needs several workers"),
        (["--bandwidth-gbit", "0", "scale.workers=2"], "is not a bandwidth"),
        (["--bandwidth-gbit", "nan", "scale.workers=2"], "is not a bandwidth"),
    ],
)
def test_a_bandwidth_that_predicts_nothing_is_refused(empty_workplace, capsys, words, said):
    (empty_workplace / "c.yaml").write_text(tiny_config().to_yaml())
    assert main(["plan", "c.yaml", *words]) == 2
    assert said in capsys.readouterr().err
