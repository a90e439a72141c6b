"""Accuracy, interval, recall, confusion, calibration and agreement, against slow twins."""

import math

import numpy as np
import pandas as pd
import pytest

from wml_ray.report.evaluation import agreement, calibration_error, evaluate_logits, write_evaluation
from wml_ray.report.intervals import wilson_interval

CLASSES = ("cat", "dog", "owl", "newt")


@pytest.fixture
def logits_and_labels():
    random = np.random.default_rng(0)
    labels_B = random.integers(0, 3, 200)  # no newt
    logits_BK = random.normal(size=(200, 4)).astype(np.float32)
    logits_BK[np.arange(200), labels_B] += 1.5
    return logits_BK, labels_B


def slow_calibration_error(logits_BK, labels_B, bins=15):
    images = []
    for logits, label in zip(logits_BK.tolist(), labels_B.tolist(), strict=True):
        exponentials = [math.exp(value) for value in logits]
        confidence = max(exponentials) / sum(exponentials)
        images.append((confidence, logits.index(max(logits)) == label))
    error = 0.0
    for index in range(bins):
        inside = [image for image in images if index / bins <= image[0] < (index + 1) / bins]
        if inside:
            confidence, correct = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            error += len(inside) / len(images) * abs(correct - confidence)
    return error


def test_the_calibration_error_is_that_of_its_definition(logits_and_labels):
    assert calibration_error(*logits_and_labels) == pytest.approx(slow_calibration_error(*logits_and_labels), abs=1e-9)
    certain = np.array([[1000.0, 0.0], [1000.0, 0.0]])
    assert calibration_error(certain, np.array([0, 1])) == 0.5  # a probability of 1 is in the last bin


@pytest.mark.parametrize(("correct", "count"), [(0, 10), (7, 10), (10, 10), (355, 360)])
def test_wilsons_interval_is_that_of_its_score_test(correct, count):
    """Its ends solve |p - share| = z * sqrt(p (1 - p) / n), which is found here by bisection."""
    share, z = correct / count, 1.959963984540054

    def outside(p):
        return abs(p - share) > z * math.sqrt(p * (1 - p) / count)

    def end(inner, outer):
        if not outside(outer):
            return outer
        for _ in range(80):
            middle = (inner + outer) / 2
            inner, outer = (inner, middle) if outside(middle) else (middle, outer)
        return inner

    assert wilson_interval(share, count) == pytest.approx((end(share, 0.0), end(share, 1.0)), abs=1e-9)


def test_confusion_accuracy_and_recall_count_each_image_once(logits_and_labels):
    logits_BK, labels_B = logits_and_labels
    found = evaluate_logits("peer0", CLASSES, logits_BK, labels_B)
    predictions_B = logits_BK.argmax(1)
    for label in range(4):
        for prediction in range(4):
            count = int(((labels_B == label) & (predictions_B == prediction)).sum())
            assert found.confusion[label, prediction] == count
    assert found.accuracy == (labels_B == predictions_B).mean()
    assert found.recalls[1] == (predictions_B[labels_B == 1] == 1).mean()
    assert math.isnan(found.recalls[3])


def test_agreement_is_the_share_of_images_with_the_same_prediction():
    shares = agreement({"peer0": np.array([1, 2, 3, 4]), "peer1": np.array([1, 2, 0, 0])})
    assert shares.loc["peer0", "peer1"] == shares.loc["peer1", "peer0"] == 0.5
    assert shares.loc["peer0", "peer0"] == 1


def test_the_files_hold_the_figures(logits_and_labels, tmp_path):
    found = [evaluate_logits(name, CLASSES, *logits_and_labels) for name in ("peer0", "ensemble_average")]
    shares = agreement({"peer0": np.array([1])})
    names = sorted(path.name for path in write_evaluation(found, shares, tmp_path / "out"))
    matrices = [f"confusion_{each.network}.{kind}" for each in found for kind in ("csv", "png")]
    assert names == sorted(["summary.csv", "agreement.csv", "recall.csv", *matrices])
    confusion = pd.read_csv(tmp_path / "out" / "confusion_peer0.csv", index_col="label")
    assert (confusion.to_numpy() == found[0].confusion).all()
    assert list(confusion.index) == list(confusion.columns) == list(CLASSES)
    summary = pd.read_csv(tmp_path / "out" / "summary.csv", index_col="network")
    assert summary.loc["peer0", "accuracy"] == pytest.approx(found[0].accuracy)
    assert summary.loc["peer0", "low"] < summary.loc["peer0", "accuracy"] < summary.loc["peer0", "high"]
