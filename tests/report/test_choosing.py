"""The networks that fit a device."""

import random
from pathlib import Path

import pytest

from wml_ray.errors import UserError
from wml_ray.report.choosing import Candidate, Limits, candidates_of, fitting, on_front


def candidate(network, macs, accuracy, latency_ms=1.0, params=1000):
    return Candidate(Path("results/wml/run"), network, params, macs, latency_ms, accuracy, 0.5)


BIG = candidate("peer0", 3_000_000, 0.99, 2.0, 300_000)
MIDDLE = candidate("peer1", 2_000_000, 0.98, 1.5, 200_000)
SMALL = candidate("peer2", 1_000_000, 0.90, 0.5, 100_000)
WORSE = candidate("peer3", 2_500_000, 0.95, 1.0, 90_000)
TREE = candidate("ensemble_average", 8_000_000, 0.995, None, 500_000)
ALL = [SMALL, BIG, TREE, WORSE, MIDDLE]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(), [TREE, BIG, MIDDLE, WORSE, SMALL]),
        (Limits(macs=2_500_000), [MIDDLE, WORSE, SMALL]),
        (Limits(params=100_000), [WORSE, SMALL]),
        (Limits(latency_ms=1.5), [MIDDLE, WORSE, SMALL]),  # that of an ensemble is not measured
        (Limits(min_accuracy=0.98), [TREE, BIG, MIDDLE]),
        (Limits(macs=2_500_000, latency_ms=1.0, min_accuracy=0.92), [WORSE]),
    ],
)
def test_those_within_the_limits_are_ordered_by_validation_accuracy(limits, expected):
    assert fitting(ALL, limits) == expected


def test_of_equally_accurate_networks_the_one_with_fewer_macs_is_first():
    equals = [candidate("peer0", macs, 0.9) for macs in (3, 1, 2)]
    assert [each.macs for each in fitting(equals, Limits())] == [1, 2, 3]


def test_the_front_is_that_of_a_comparison_of_all_pairs():
    draw = random.Random(0)
    for _ in range(50):
        networks = [candidate(f"peer{index}", draw.randint(1, 6), draw.randint(1, 6) / 6) for index in range(12)]

        def beats(one, other):
            costs = (one.macs <= other.macs, one.validation_accuracy >= other.validation_accuracy)
            differs = (one.macs, one.validation_accuracy) != (other.macs, other.validation_accuracy)
            return all(costs) and differs

        assert on_front(networks) == {each for each in networks if not any(beats(other, each) for other in networks)}


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(macs=500_000), "peer 2 of run, has 1.00M MACs, 500k above 500k"),
        (Limits(params=89_000), "peer 3 of run, has 90.0k params, 1.00k above 89.0k"),
        (Limits(latency_ms=0.4), "peer 2 of run, has a latency of 0.50 ms, 0.10 ms above --max-latency-ms 0.4"),
        (Limits(min_accuracy=0.999), "average ensemble of run, has 99.50% on validation images, 0.40% below"),
        (
            Limits(macs=1_900_000, min_accuracy=0.97),
            "peer 1 of run, has 2.00M MACs, 100k above 1.90M",
        ),
    ],
)
def test_where_nothing_fits_the_nearest_is_named_with_its_miss(limits, words):
    with pytest.raises(UserError, match="no network is within the limits; the nearest, ") as error:
        fitting(ALL, limits)
    assert words in str(error.value)


def test_every_peer_and_ensemble_of_a_result_is_a_candidate():
    peer = {"params": 5, "macs": 7, "latency_ms": 0.5, "validation_accuracy": 0.8, "test_accuracy": 0.7}
    accuracies = {"validation_accuracy": 0.9, "test_accuracy": 0.85}
    result = {
        "peers": [{"peer": 0, **peer}, {"peer": 1, **peer}],
        "tree": {"params": 9, "macs": 12},
        "predictions": {"ensemble_average": accuracies, "ensemble_weighted": accuracies, "leader": accuracies},
    }
    found = candidates_of(result, Path("run"))
    assert [each.choice for each in found] == ["0", "1", "average", "weighted"]
    assert found[2] == Candidate(Path("run"), "ensemble_average", 9, 12, None, 0.9, 0.85)
