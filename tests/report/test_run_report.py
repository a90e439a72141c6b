"""The report of finished runs, and the modules that it needs."""

import subprocess
import sys

import pytest
from scipy.stats import binomtest

from wml_ray.report.run_report import wilson_interval


@pytest.mark.parametrize(("correct", "images"), [(0, 359), (358, 359), (359, 359), (9500, 10000)])
def test_the_interval_is_scipys(correct, images):
    expected = binomtest(correct, images).proportion_ci(method="wilson")
    assert wilson_interval(correct / images, images) == pytest.approx((expected.low, expected.high), abs=1e-5)


REPORT = """
import sys
from wml_ray.cli.main import main
assert main(["report", sys.argv[1]]) == 0
print(*sys.modules)
"""


def test_a_report_of_runs_imports_neither_torch_nor_ray(workplace):
    experiment = log_finished_run(peers=2)
    output = subprocess.run(
        [sys.executable, "-c", REPORT, experiment], capture_output=True, text=True, check=True
    ).stdout
    assert "accuracy_macs.png" in output
    assert not {"torch", "ray"} & set(output.split())
