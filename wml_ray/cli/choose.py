"""The verbs that choose among networks: their options and output."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from wml_ray.cli.exit_codes import OK
from wml_ray.errors import UserError

UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}


def add_pick(verbs: Any) -> None:
    """Add the verb `pick`."""
    text = "the networks of finished runs that fit a device, the most accurate on validation images first"
    pick = verbs.add_parser("pick", help=text, description=text)
    text = "run (id, folder or address), experiment (run.name) or study; several are compared"
    pick.add_argument("runs", metavar="RUN", nargs="+", help=text)
    pick.add_argument("--max-macs", metavar="N", type=_count, help="most multiply-accumulates an image, such as 2M")
    pick.add_argument("--max-params", metavar="N", type=_count, help="most parameters, such as 100k")
    pick.add_argument("--max-latency-ms", metavar="MS", type=_count, help="longest time of an image; peers only")
    pick.add_argument("--min-accuracy", metavar="SHARE", type=_share, help="least validation accuracy, such as 0.97")
    pick.add_argument("--csv", action="store_true", help="print only the table, as CSV with every figure")
    _add_storage_path(pick)
    pick.set_defaults(command="pick")


def add_evaluate(verbs: Any) -> None:
    """Add the verb `evaluate`."""
    text = "accuracy, recall, confusion, calibration and agreement of the networks of a run"
    evaluate = verbs.add_parser("evaluate", help=text, description=text)
    evaluate.add_argument("run", metavar="RUN", help="run id, or folder or address of a run")
    text = "folder of your own images, FOLDER/<class>/<image>, in place of the test images"
    evaluate.add_argument("--data", metavar="FOLDER", help=text)
    text = "number of a peer, `ensemble`, `average`, `weighted`, or `all`: the peers and the ensemble (all)"
    evaluate.add_argument("--peer", metavar="I", default="all", help=text)
    evaluate.add_argument("--out", metavar="FOLDER", default="reports", help="folder of the files (reports/)")
    evaluate.add_argument("--csv", action="store_true", help="print only the table, as CSV")
    add_run_options(evaluate)
    evaluate.set_defaults(command="evaluate")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which checkpoint of the run is loaded, and how."""
    parser.add_argument("--epoch", metavar="N", type=int, help="epoch of a kept checkpoint (the one that was tested)")
    parser.add_argument("--trust", action="store_true", help="import and call code of your own that the run names")
    _add_storage_path(parser)


def _add_storage_path(parser: argparse.ArgumentParser) -> None:
    text = "folder or address that names are looked up below (results)"
    parser.add_argument("--storage-path", metavar="PATH", default="results", help=text)


def _count(text: str) -> float:
    """A number such as 100k, 2M or 1.5G."""
    try:
        value = float(text[:-1]) * UNITS[text[-1]] if text[-1:] in UNITS else float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no number such as 250000, 100k or 2M")
    return value


def _share(text: str) -> float:
    """A share between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no share from 0 to 1, such as 0.97")
    return value


def pick_networks(options: argparse.Namespace) -> int:
    """Run `wml-ray pick`."""
    from rich.console import Console

    from wml_ray.cli.output import print_line
    from wml_ray.report.choosing import Limits, candidates_frame, candidates_table
    from wml_ray.verbs.pick import pick

    limits = Limits(options.max_macs, options.max_params, options.max_latency_ms, options.min_accuracy)
    found = pick(options.runs, limits, options.storage_path)
    if options.csv:
        candidates_frame(found).to_csv(sys.stdout, index=False)
        return OK
    Console().print(candidates_table(found))
    best = found[0]
    print_line("val, test   accuracy; chosen by validation images. front: none is as accurate with fewer MACs")
    print_line(f"export      wml-ray export {shlex.quote(str(best.folder))} --peer {best.choice} --to onnx")
    return OK


def evaluate_run(options: argparse.Namespace) -> int:
    """Run `wml-ray evaluate`."""
    from rich.console import Console

    from wml_ray.cli.output import print_line
    from wml_ray.report.evaluation import (
        CALIBRATION_BINS,
        agreement_table,
        evaluation_table,
        summary_frame,
        write_evaluation,
    )
    from wml_ray.verbs.evaluate import evaluate
    from wml_ray.verbs.progress import image_progress
    from wml_ray.verbs.run import load_run

    run = load_run(options.run, options.storage_path, options.trust)
    networks = None if options.peer == "all" else [network_choice(options.peer)]
    with image_progress(run.folder.name) as progress:
        found, shares = evaluate(run, options.data, networks, options.epoch, progress)
    if options.csv:
        summary_frame(found).to_csv(sys.stdout)
        return OK
    console, images = Console(), f"{found[0].images:,} images of {options.data or 'the test set'}"
    print_line(f"{run.folder.name} on {images}")
    console.print(evaluation_table(found))
    if len(shares) > 1:
        console.print(agreement_table(shares))
    print_line(f"calibration error: expected, over {CALIBRATION_BINS} bins of equal width of the highest probability")
    images_name = Path(options.data).resolve().name if options.data else "test"
    for path in write_evaluation(found, shares, Path(options.out) / run.folder.name / images_name):
        print_line(f"wrote {path}")
    return OK


def network_choice(peer: str) -> int | str:
    """The value of --peer: a number, or the name of an ensemble.

    Raises:
        UserError: it is neither.
    """
    if peer not in ("ensemble", "average", "weighted") and not peer.isdecimal():
        raise UserError(f"--peer {peer}: give the number of a peer, such as 0, or `ensemble`, `average` or `weighted`")
    return int(peer) if peer.isdecimal() else peer
