"""The plots of a study: Pareto front, searched keys, importance, history, peers of the best trials.

Optuna's own plots need pyplot, whose global state is not safe in other threads. They also lack the trials that did not
train for the full budget, the Pareto front, log axes, and the best value so far where there are several objectives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from wml_ray.report.analysis import best_so_far, best_trial_numbers, comparable_trials, hypervolume, pareto_front
from wml_ray.report.study_tables import TRIAL, Column, key_of, metric_of
from wml_ray.report.style import colours, dress, legend_below, new_axes
from wml_ray.tracking.results import StudyRecords

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BEST_TRIALS = 5
UNCROWDED_TRIALS = 500
"""The marks of more trials are smaller, so that they do not hide each other."""
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "0.6"
OBJECTIVE_COLOURS = (BLUE, "#e69f00", "#009e73", "#cc79a7")


@dataclass(frozen=True)
class Group:
    """Trials that are drawn in the same style."""

    label: str
    trials: pd.DataFrame
    style: dict[str, Any]


def draw(study: StudyRecords, shares: dict[str, dict[str, float]]) -> dict[str, Figure]:
    """All plots that are not empty, by name. `shares` are the importances."""
    figures = {
        "pareto": _pareto(study),
        "parameters": _parameters(study),
        "importance": _importance(study, shares) if any(shares.values()) else None,
        "history": _history(study),
        "peers": _peers(study),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _groups(study: StudyRecords) -> list[Group]:
    trials = study.trials
    on_front = trials["trial"].isin(pareto_front(study))
    comparable = trials["trial"].isin(comparable_trials(study)["trial"]) & ~on_front
    crowded = min(1.0, UNCROWDED_TRIALS / max(len(trials), 1))
    area, line = max(30 * crowded, 3), max(crowded, 0.3)
    hollow = {"facecolors": "none", "edgecolors": GREY, "s": area, "linewidths": line}
    best_label = "Pareto front" if len(study.objectives) > 1 else "best trial"
    return [
        Group("stopped early, last value", trials[trials["state"] == "STOPPED"], hollow),
        Group("running, last value", trials[trials["state"] == "RUNNING"], {**hollow, "marker": "^"}),
        Group("full budget", trials[comparable], {"color": BLUE, "s": area, "alpha": 0.8, "linewidths": 0}),
        Group(best_label, trials[on_front], {"color": ORANGE, "s": 48, "zorder": 4}),
    ]


def _floor(study: StudyRecords, objective: Column) -> float:
    """The lowest value on an accuracy axis, so that outliers far below do not compress the good trials to a line."""
    values = objective.values(comparable_trials(study))
    if objective.kind != "percent" or values.empty:
        return -math.inf
    quartile, top = float(values.quantile(0.25)), float(values.max())
    on_front = objective.values(study.trials[study.trials["trial"].isin(pareto_front(study))])
    return min(quartile - max(top - quartile, 1.0), float(on_front.min()) - 0.1)


def _scatter(axes: Axes, study: StudyRecords, x: Column, y: Column) -> None:
    floors = _floor(study, x), _floor(study, y)
    for group in _groups(study):
        positions = x.values(group.trials), y.values(group.trials)
        drawn = positions[0].notna() & positions[1].notna()
        left, below = positions[0] < floors[0], positions[1] < floors[1]
        for marker, chosen in (("", drawn & ~left & ~below), ("v", drawn & below), ("<", drawn & left & ~below)):
            if chosen.any():
                style = {**group.style, "marker": marker, "s": 20} if marker else group.style
                points = [values[chosen].clip(lower=floor) for values, floor in zip(positions, floors, strict=True)]
                axes.scatter(*points, **style, label="" if marker else group.label)
        if (drawn & (left | below)).any():
            axes.scatter([], [], marker="v", s=20, facecolors="none", edgecolors=GREY, label="beyond the axis")
    x.dress(axes.xaxis)
    y.dress(axes.yaxis)


def _failed_marks(axes: Axes, study: StudyRecords, x: Column) -> None:
    positions = x.values(study.trials[study.trials["state"] == "FAILED"]).dropna()
    if len(positions):
        bottom = axes.get_xaxis_transform()
        axes.scatter(positions, [0.0] * len(positions), marker="x", color="0.3", s=28, transform=bottom, clip_on=False)
        axes.scatter([], [], marker="x", color="0.3", s=28, label="failed")
        axes.update_datalim([(position, 0.0) for position in positions], updatey=False)
        axes.autoscale_view()


def _grid(panels: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = panels if panels <= 3 else columns
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(max(5.5, width * columns), height * rows + 0.6), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False, **shared).ravel()
    for spare in every[panels:]:
        spare.remove()
    return figure, list(every[:panels])


def _pareto(study: StudyRecords) -> Figure | None:
    names = sorted(study.objectives, key=lambda name: metric_of(name).kind != "percent")  # accuracy on the y axis
    if study.trials[names].isna().all(axis=None):
        return None
    if len(names) == 1:
        size = "peers/macs/tree"
        sized = size in study.trials and size not in names and study.trials[size].notna().any()
        pairs = [(metric_of(size) if sized else TRIAL, metric_of(names[0]))]
        title = "The objective against size" if sized else "The objective of every trial"
    else:
        pairs = [(metric_of(x), metric_of(y)) for index, y in enumerate(names) for x in names[index + 1 :]]
        title = "Pareto front" if len(names) == 2 else "Pareto front for each pair of objectives"
    figure, panels = _grid(len(pairs), 2, *((7, 4.6) if len(pairs) == 1 else (3.6, 3.4)))
    for axes, (x, y) in zip(panels, pairs, strict=True):
        dress(axes, "", x.title.replace("\n", ", "), y.title)
        axes.margins(0.09)
        _scatter(axes, study, x, y)
        if len(names) == 2:
            _staircase(axes, study, x, y)
    figure.suptitle(title)
    legend_below(figure, panels)
    figure.draw_without_rendering()  # the labels depend on the positions of the points
    for axes, (x, y) in zip(panels, pairs, strict=True):
        _label_front(axes, study, x, y)
    return figure


def _staircase(axes: Axes, study: StudyRecords, x: Column, y: Column) -> None:
    """Draw the border of the region that the front dominates."""
    chosen = study.trials[study.trials["trial"].isin(pareto_front(study))]
    steps = sorted(zip(x.values(chosen), y.values(chosen), strict=True))
    where: Literal["pre", "post"] = "post" if study.objectives[x.name] == "min" else "pre"
    axes.step([s[0] for s in steps], [s[1] for s in steps], where=where, color=ORANGE, linewidth=1.2, alpha=0.7)


def _label_front(axes: Axes, study: StudyRecords, x: Column, y: Column) -> None:
    """Write trial numbers beside the front, the ends first; a number that would cover a point or number is left out."""
    comparable = comparable_trials(study)
    comparable = comparable[x.values(comparable).notna()]
    positions = dict(
        zip(comparable["trial"], zip(x.values(comparable), y.values(comparable), strict=True), strict=True)
    )
    left = study.objectives.get(x.name, "min") == "min"
    above = study.objectives[y.name] == "max"
    points = {number: axes.transData.transform(point) for number, point in positions.items()}
    boxes: list[tuple[float, float]] = []
    labelled = [number for number in pareto_front(study) if number in positions]
    for number in [*labelled[:1], *labelled[:0:-1]]:
        centre = points[number] + [-18 if left else 18, 14 if above else -14]
        others = [point for other, point in points.items() if other != number]
        hidden = any(abs(centre[0] - other[0]) < 28 and abs(centre[1] - other[1]) < 14 for other in boxes)
        covers = any(abs(centre[0] - other[0]) < 17 and abs(centre[1] - other[1]) < 11 for other in others)
        if hidden or covers:
            continue
        boxes.append((centre[0], centre[1]))
        offset = (-5 if left else 5, 4 if above else -4)
        style: dict[str, Any] = {"ha": "right" if left else "left", "va": "bottom" if above else "top", "color": ORANGE}
        axes.annotate(str(number), positions[number], offset, textcoords="offset points", fontsize="small", **style)


def _first_accuracy(study: StudyRecords) -> Column:
    metrics = [metric_of(name) for name in study.objectives]
    return next((metric for metric in metrics if metric.kind == "percent"), metrics[0])


def _parameters(study: StudyRecords) -> Figure | None:
    if not study.searched:
        return None
    y = _first_accuracy(study)
    figure, panels = _grid(len(study.searched), 3, 3.6, 2.8, sharey=True)
    for index, (axes, key) in enumerate(zip(panels, study.searched, strict=True)):
        x = key_of(study, key)
        dress(axes, "", x.title, "" if index % 3 else y.title)
        _failed_marks(axes, study, x)
        _scatter(axes, study, x, y)
        if study.trials[y.name].isna().all():
            axes.set_yticks([])
    legend_below(figure, panels)
    return figure


def _importance(study: StudyRecords, shares: dict[str, dict[str, float]]) -> Figure:
    computed = {objective: keys for objective, keys in shares.items() if keys}
    keys = sorted(study.searched, key=lambda key: sum(found[key] for found in computed.values()))
    height = 0.8 / len(computed)
    figure, (axes,) = _grid(1, 1, 7, 1.3 + len(keys) * (0.24 + 0.18 * len(computed)))
    dress(axes, "Importance of the searched keys", "importance (%)", "")
    for index, (objective, found) in enumerate(computed.items()):
        positions = [row + 0.4 - height * (index + 0.5) for row in range(len(keys))]
        label = metric_of(objective).title.replace("\n", ", ").replace(" (%)", "")
        colour = OBJECTIVE_COLOURS[index % len(OBJECTIVE_COLOURS)]
        bars = axes.barh(positions, [100 * found[key] for key in keys], 0.9 * height, color=colour, label=label)
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize="small")
    axes.set_yticks(range(len(keys)), [key_of(study, key).title for key in keys])
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.1)
    legend_below(figure, [axes])
    return figure


def _history(study: StudyRecords) -> Figure | None:
    names = list(study.objectives)
    if study.trials[names].isna().all(axis=None):
        return None
    several = len(names) > 1 and len(comparable_trials(study)) > 1
    figure, panels = _grid(len(names) + several, 2, 3.6 if several else 7, 3.4)
    for axes, name in zip(panels, names, strict=False):
        objective = metric_of(name)
        dress(axes, "", "trial", objective.title)
        _failed_marks(axes, study, TRIAL)
        _scatter(axes, study, TRIAL, objective)
        _so_far(axes, study, best_so_far(study, name), 100 if objective.kind == "percent" else 1)
    if several:
        _hypervolume(panels[-1], study)
    for axes in panels:
        axes.set_xlim(-0.5 - 0.02 * len(study.trials), 1.02 * max(len(study.trials), 1) - 0.5)
    legend_below(figure, panels)
    return figure


def _hypervolume(axes: Axes, study: StudyRecords) -> None:
    import numpy as np

    dress(axes, "", "trial", "hypervolume (% of the box\nfrom worst to best values)")
    values = comparable_trials(study)[list(study.objectives)].to_numpy(float)
    whole = float(np.prod(np.ptp(values, axis=0))) if len(values) else 0.0
    _so_far(axes, study, hypervolume(study), 100 / (whole or 1.0))
    axes.set_ylim(0, 100)


def _so_far(axes: Axes, study: StudyRecords, history: Sequence[tuple[int, float]], factor: float) -> None:
    if history:
        history = [*history, (max(study.trials["trial"]), history[-1][1])]
        values = [factor * value for _, value in history]
        axes.step([number for number, _ in history], values, where="post", color=ORANGE, label="best so far")


def _peers(study: StudyRecords) -> Figure | None:
    trials = best_trials(study)
    if not trials:
        return None
    figure, axes = new_axes("Peers of the best trials", "MACs an image", "validation accuracy (%)")
    for (number, peers), colour in zip(trials, colours(len(trials)), strict=True):
        peers = sorted(peers, key=lambda peer: peer["macs"])
        values = [100 * peer["val"] for peer in peers]
        axes.plot([peer["macs"] for peer in peers], values, marker="o", color=colour, label=f"trial {number}")
    Column("", "", "", "count").dress(axes.xaxis)
    legend_below(figure, [axes])
    return figure


def best_trials(study: StudyRecords) -> list[tuple[int, list[dict[str, Any]]]]:
    """Numbers and peers of the best trials that have peers."""
    by_number = study.trials.set_index("trial")["peers"]
    return [(number, by_number[number]) for number in best_trial_numbers(study, BEST_TRIALS) if by_number[number]]
