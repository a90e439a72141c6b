"""Tables and pictures of finished runs."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from wml_ray.report.style import (
    colours,
    count_labels,
    log_ticks,
    new_axes,
    new_table,
    percent,
    save_figures,
    short_count,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


# The average is dashed and drawn last, so that both are seen where they coincide.
ENSEMBLE_LINES: dict[str, dict[str, Any]] = {
    "weighted": {"color": "black"},
    "average": {"color": "tab:red", "linestyle": "--"},
}


PEER_HEADINGS = (
    *("peer", "channels\nremoved", "params\nremoved", "MACs\nremoved", "\nparams", "\nMACs", "latency\nms"),
    *("val\n%", "test\n%", "\nweight"),
)


def peer_table(result: dict[str, Any]) -> Table:
    """The table printed at the end of a training; `result` is the content of result.json."""
    table = new_table(*PEER_HEADINGS)
    for row in _peer_rows(result):
        table.add_row(*row)
    table.add_section()
    for row in _ensemble_rows(result):
        table.add_row(*row)
    return table


def peer_markdown(result: dict[str, Any]) -> str:
    """`peer_table` as Markdown, with the number of images and the epoch below."""
    headings = [heading.replace("\n", " ").strip() for heading in PEER_HEADINGS]
    rows = [headings, ["---:"] * len(headings), *_peer_rows(result), *_ensemble_rows(result)]
    images, shares = result["images"], [peer["test_accuracy"] for peer in result["peers"]]
    low, high = (100 * bound for bound in wilson_interval(sum(shares) / len(shares), images["test"]))
    return "\n".join(
        [
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"Accuracy of epoch {result['test_epoch']} on {images['validation']} validation and {images['test']} test "
            f"images. The 95 % interval of a test accuracy is {high - low:.1f} percentage points wide.",
        ]
    )


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of `count` images (Wilson's score interval)."""
    z = 1.96
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return centre - half, centre + half


def _peer_rows(result: dict[str, Any]) -> list[list[str]]:
    return [
        [
            str(peer["peer"]),
            *(_removed(peer[f"{unit}_drop"]) for unit in ("channels", "params", "macs")),
            short_count(peer["params"]),
            short_count(peer["macs"]),
            f"{peer['latency_ms']:.2f}",
            percent(peer["validation_accuracy"]),
            percent(peer["test_accuracy"]),
            f"{peer['weight']:.4f}",
        ]
        for peer in result["peers"]
    ]


def _ensemble_rows(result: dict[str, Any]) -> list[list[str]]:
    return [
        [kind, *[""] * 6, percent(ensemble["validation_accuracy"]), percent(ensemble["test_accuracy"]), ""]
        for kind, ensemble in result["ensembles"].items()
    ]


def plan_table(peers: Sequence[dict[str, Any]]) -> Table:
    """Sizes of the peers a run would train."""
    removed = ("channels\nremoved", "params\nremoved", "MACs\nremoved")
    table = new_table("peer", *removed, "\nchannels", "\nparams", "\nMACs")
    for index, peer in enumerate(peers):
        units = ("channels", "params", "macs")
        table.add_row(
            str(index), *(_removed(peer[f"{unit}_drop"]) for unit in units), *(short_count(peer[u]) for u in units)
        )
    return table


def runs_table(runs: pd.DataFrame) -> Table:
    """One line a finished run, as `records.finished_runs` gives them, the best by validation first."""
    table = new_table("run", "peers", "MACs\nfrom", "MACs\nto", "ensemble\nval %", "ensemble\ntest %", "peers\ntest %")
    for _, run in runs.iterrows():
        peers = run["peers"]
        macs, test = [peer["macs"] for peer in peers], [peer["test"] for peer in peers]
        table.add_row(
            run["run"],
            str(len(peers)),
            short_count(min(macs)),
            short_count(max(macs)),
            percent(run["val/accuracy/ensemble_weighted"]),
            percent(run["test/accuracy/ensemble_weighted"]),
            f"{min(test) * 100:.2f}-{max(test) * 100:.2f}",
        )
    return table


def write_files(result: dict[str, Any], folder: Path) -> list[Path]:
    """Pictures and `peers.csv` of one finished run; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    epochs = [entry["epoch"] for entry in result["history"]]
    series = {key: [entry["metrics"][key] for entry in result["history"]] for key in result["history"][0]["metrics"]}
    figures = {
        "accuracy": _accuracy_over_epochs(epochs, series, len(result["peers"])),
        "weights": _weights_over_epochs(epochs, series, len(result["peers"])),
        "accuracy_macs": _accuracy_against_macs(result),
    }
    return [_write_csv(result["peers"], folder / "peers.csv"), *save_figures(figures, folder)]


def write_comparison(runs: pd.DataFrame, folder: Path) -> list[Path]:
    """Every peer of every run of an experiment: test accuracy against MACs, as a picture and as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = new_axes("Test accuracy against size, every peer of every run", "MACs an image", "test accuracy (%)")
    for _, run in runs.iterrows():
        peers = sorted(run["peers"], key=lambda peer: peer["macs"])
        axes.plot([p["macs"] for p in peers], [100 * p["test"] for p in peers], marker="o", label=run["run"])
    axes.set_xscale("log")
    log_ticks(axes.xaxis)
    count_labels(axes.xaxis)
    axes.legend(fontsize="small", frameon=False)
    rows = [{"run": run["run"], **peer} for _, run in runs.iterrows() for peer in run["peers"]]
    return [_write_csv(rows, folder / "peers.csv"), *save_figures({"accuracy_macs": figure}, folder)]


def _accuracy_over_epochs(epochs: list[int], series: dict[str, list[float]], num_peers: int) -> Figure:
    figure, axes = new_axes("Validation accuracy of each peer and both ensembles", "epoch", "accuracy (%)")
    for index, colour in enumerate(colours(num_peers)):
        values = [100 * value for value in series[f"val/accuracy/peer{index}"]]
        axes.plot(epochs, values, color=colour, label=f"peer {index}")
    for kind, line in ENSEMBLE_LINES.items():
        values = [100 * value for value in series[f"val/accuracy/ensemble_{kind}"]]
        axes.plot(epochs, values, **line, label=f"{kind} ensemble")
    lower_half = sorted(value for key, values in series.items() if key.startswith("val/accuracy/") for value in values)
    axes.set_ylim(bottom=max(0.0, 100 * lower_half[len(lower_half) // 10] - 5))
    axes.legend(frameon=False)
    return figure


def _weights_over_epochs(epochs: list[int], series: dict[str, list[float]], num_peers: int) -> Figure:
    figure, axes = new_axes("Peer weights omega", "epoch", "weight")
    for index, colour in enumerate(colours(num_peers)):
        axes.plot([0, *epochs], [1 / num_peers, *series[f"weights/peer{index}"]], color=colour, label=f"peer {index}")
    axes.legend(frameon=False)
    return figure


def _accuracy_against_macs(result: dict[str, Any]) -> Figure:
    figure, axes = new_axes("Test accuracy against size", "MACs an image (millions)", "test accuracy (%)")
    for peer, colour in zip(result["peers"], colours(len(result["peers"])), strict=True):
        point = (peer["macs"] / 1e6, 100 * peer["test_accuracy"])
        axes.scatter(*point, color=colour, s=60, zorder=3)
        axes.annotate(f"peer {peer['peer']}", point, xytext=(7, 5), textcoords="offset points")
    for kind, line in ENSEMBLE_LINES.items():
        axes.axhline(100 * result["ensembles"][kind]["test_accuracy"], **line, label=f"{kind} ensemble")
    axes.margins(x=0.15, y=0.2)
    axes.legend(frameon=False)
    return figure


def _write_csv(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _removed(share: float) -> str:
    return f"{share * 100:.1f}%"
