"""Tables and plots of finished runs."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from wml_ray.report.intervals import wilson_interval
from wml_ray.report.style import (
    colours,
    count_labels,
    integer_ticks,
    legend_below,
    log_ticks,
    new_axes,
    new_table,
    percent,
    prediction_words,
    save_figures,
    short_count,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


AVERAGE_LINE = {"color": "tab:red", "linestyle": "--"}  # dashed and drawn last, to show where lines coincide
PREDICTION_COLOURS = ("black", "tab:purple", "tab:brown", "tab:olive", "tab:cyan")


def peer_table(result: dict[str, Any]) -> Table:
    """The table printed at the end of a training; `result` is the content of result.json."""
    headings, peers, predictions = _cells(result)
    table = new_table(*headings)
    for row in peers:
        table.add_row(*row)
    table.add_section()
    for row in predictions:
        table.add_row(*row)
    return table


def peer_markdown(result: dict[str, Any]) -> str:
    """`peer_table` as Markdown, with the number of images and the epoch below."""
    headings, peers, predictions = _cells(result)
    headings = [heading.replace("\n", " ").strip() for heading in headings]
    images, shares = result["images"], [peer["test_accuracy"] for peer in result["peers"]]
    low, high = (100 * bound for bound in wilson_interval(sum(shares) / len(shares), images["test"]))
    return "\n".join(
        [
            *(f"| {' | '.join(row)} |" for row in (headings, ["---:"] * len(headings), *peers, *predictions)),
            "",
            f"Accuracy of epoch {result['test_epoch']} on {images['validation']} validation and {images['test']} test "
            f"images. The 95 % interval of a test accuracy is {high - low:.1f} percentage points wide.",
        ]
    )


def _cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Headings, rows of the peers, and rows of the other predictions; no weights where the method has none."""
    weight = ["\nweight"] if "weight" in result["peers"][0] else []
    headings = ["peer", "channels\nremoved", "params\nremoved", "MACs\nremoved", "\nparams", "\nMACs", "latency\nms"]
    headings += ["val\n%", "test\n%", *weight]
    peers = [
        [
            str(peer["peer"]),
            *(_removed(peer[f"{unit}_drop"]) for unit in ("channels", "params", "macs")),
            short_count(peer["params"]),
            short_count(peer["macs"]),
            f"{peer['latency_ms']:.2f}",
            percent(peer["validation_accuracy"]),
            percent(peer["test_accuracy"]),
            *(f"{peer['weight']:.4f}" for _ in weight),
        ]
        for peer in result["peers"]
    ]
    predictions = [
        [
            name.removeprefix("ensemble_"),
            *[""] * 6,
            percent(prediction["validation_accuracy"]),
            percent(prediction["test_accuracy"]),
            *("" for _ in weight),
        ]
        for name, prediction in result["predictions"].items()
    ]
    return headings, peers, predictions


def plan_table(peers: Sequence[dict[str, Any]]) -> Table:
    """The sizes of the peers that a run would train."""
    removed = ("channels\nremoved", "params\nremoved", "MACs\nremoved")
    table = new_table("peer", *removed, "\nchannels", "\nparams", "\nMACs")
    for index, peer in enumerate(peers):
        units = ("channels", "params", "macs")
        table.add_row(
            str(index), *(_removed(peer[f"{unit}_drop"]) for unit in units), *(short_count(peer[u]) for u in units)
        )
    return table


def runs_table(runs: pd.DataFrame) -> Table:
    """One row for each run of `tracking.results.finished_runs`, in their order."""
    table = new_table("run", "peers", "MACs\nfrom", "MACs\nto", "method\nval %", "method\ntest %", "peers\ntest %")
    for name, (_, run) in zip(_short_names(list(runs["run"])), runs.iterrows(), strict=True):
        peers = run["peers"]
        macs, test = [peer["macs"] for peer in peers], [peer["test"] for peer in peers]
        table.add_row(
            name,
            str(len(peers)),
            short_count(min(macs)),
            short_count(max(macs)),
            percent(run["val/accuracy/method"]),
            percent(run["test/accuracy/method"]),
            f"{min(test) * 100:.2f}-{max(test) * 100:.2f}",
        )
    return table


def write_files(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots and `peers.csv` of one finished run; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    epochs = [entry["epoch"] for entry in result["history"]]
    series = {key: [entry["metrics"][key] for entry in result["history"]] for key in result["history"][0]["metrics"]}
    figures = {
        "accuracy": _accuracy_over_epochs(epochs, series, result),
        "accuracy_macs": _accuracy_against_macs(result),
    }
    if "weights/peer0" in series:
        figures["weights"] = _weights_over_epochs(epochs, series, len(result["peers"]))
    return [_write_csv(result["peers"], folder / "peers.csv"), *save_figures(figures, folder)]


def write_comparison(runs: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the test accuracy and MACs of every peer of every run, as a plot and as CSV; returns the paths.

    The plot has 95 % intervals where MLflow has the number of test images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = new_axes("Test accuracy against size, every peer of every run", "MACs an image", "test accuracy (%)")
    for name, (_, run) in zip(_short_names(list(runs["run"])), runs.iterrows(), strict=True):
        peers = sorted(run["peers"], key=lambda peer: peer["macs"])
        macs, shares = [peer["macs"] for peer in peers], [peer["test"] for peer in peers]
        (line,) = axes.plot(macs, [100 * share for share in shares], marker="o", label=name)
        _draw_intervals(axes, macs, shares, run["test_images"], line.get_color())
    axes.set_xscale("log")
    log_ticks(axes.xaxis)
    count_labels(axes.xaxis)
    legend_below(figure, [axes])
    rows = [{"run": run["run"], **peer} for _, run in runs.iterrows() for peer in run["peers"]]
    return [_write_csv(rows, folder / "peers.csv"), *save_figures({"accuracy_macs": figure}, folder)]


def _short_names(names: Sequence[str]) -> list[str]:
    """Run names without the `key=value` words that all of them have."""
    words = [name.split(" ") for name in names]
    common = set(words[0][1:]).intersection(*words) if len(words) > 1 else set()
    return [" ".join(word for word in name if word not in common) for name in words]


def _draw_intervals(axes: Axes, x: Sequence[float], shares: Sequence[float], num_images: float, colour: Any) -> None:
    """Vertical bars from the lower to the upper bound of the 95 % interval of each accuracy."""
    if not math.isnan(num_images):
        low, high = zip(*(wilson_interval(share, int(num_images)) for share in shares), strict=True)
        axes.vlines(x, [100 * bound for bound in low], [100 * bound for bound in high], color=colour, alpha=0.5)


def _prediction_lines(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The style and label of each prediction's line, by name."""
    others = [name for name in result["predictions"] if name != "ensemble_average"]
    lines: dict[str, dict[str, Any]] = {
        name: {"color": PREDICTION_COLOURS[index % len(PREDICTION_COLOURS)]} for index, name in enumerate(others)
    }
    lines["ensemble_average"] = AVERAGE_LINE
    return {name: {**line, "label": prediction_words(name)} for name, line in lines.items()}


def _accuracy_over_epochs(epochs: list[int], series: dict[str, list[float]], result: dict[str, Any]) -> Figure:
    figure, axes = new_axes("Validation accuracy of peers and ensembles", "epoch", "accuracy (%)")
    for index, colour in enumerate(colours(len(result["peers"]))):
        values = [100 * value for value in series[f"val/accuracy/peer{index}"]]
        axes.plot(epochs, values, color=colour, label=f"peer {index}")
    for name, line in _prediction_lines(result).items():
        axes.plot(epochs, [100 * value for value in series[f"val/accuracy/{name}"]], **line)
    ascending = sorted(value for key, values in series.items() if key.startswith("val/accuracy/") for value in values)
    axes.set_ylim(bottom=max(0.0, 100 * ascending[len(ascending) // 10] - 5))
    integer_ticks(axes.xaxis)
    legend_below(figure, [axes])
    return figure


def _weights_over_epochs(epochs: list[int], series: dict[str, list[float]], num_peers: int) -> Figure:
    figure, axes = new_axes("Peer weights omega", "epoch", "weight")
    for index, colour in enumerate(colours(num_peers)):
        axes.plot([0, *epochs], [1 / num_peers, *series[f"weights/peer{index}"]], color=colour, label=f"peer {index}")
    integer_ticks(axes.xaxis)
    legend_below(figure, [axes])
    return figure


def _accuracy_against_macs(result: dict[str, Any]) -> Figure:
    figure, axes = new_axes("Test accuracy against size", "MACs an image (millions)", "test accuracy (%)")
    num_images = result["images"]["test"]
    for peer, colour in zip(result["peers"], colours(len(result["peers"])), strict=True):
        point = (peer["macs"] / 1e6, 100 * peer["test_accuracy"])
        axes.scatter(*point, color=colour, s=60, zorder=3)
        _draw_intervals(axes, point[:1], [peer["test_accuracy"]], num_images, colour)
        axes.annotate(f"peer {peer['peer']}", point, xytext=(7, 5), textcoords="offset points")
    for name, line in _prediction_lines(result).items():
        share = result["predictions"][name]["test_accuracy"]
        axes.axhline(100 * share, **line)
        axes.axhspan(*(100 * bound for bound in wilson_interval(share, num_images)), color=line["color"], alpha=0.07)
    axes.vlines([], [], [], color="grey", label=f"95 % interval ({num_images} test images)")
    axes.margins(x=0.15, y=0.2)
    legend_below(figure, [axes])
    return figure


def _write_csv(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _removed(share: float) -> str:
    return f"{share * 100:.1f}%"
