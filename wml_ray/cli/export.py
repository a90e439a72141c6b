"""The verbs that take a network out of a run: their options and output."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wml_ray.cli.exit_codes import OK

if TYPE_CHECKING:
    from wml_ray.export.network import Network

DEFAULT_DROP = 0.02


def add_export(verbs: Any) -> None:
    """Add the verb `export`."""
    text = "write one network of a run as a file that is checked in its own runtime, with a model card"
    export = verbs.add_parser("export", help=text, description=text)
    _add_network(export)
    export.add_argument("--to", choices=("onnx", "pt2", "safetensors"), required=True, help="format of the file")
    text = "quantise to int8, calibrated on training images; with --to onnx"
    export.add_argument("--int8", action="store_true", help=text)
    text = "largest drop in validation accuracy that --int8 may cost (0.02)"
    export.add_argument("--max-drop", metavar="SHARE", type=float, default=DEFAULT_DROP, help=text)
    export.add_argument("--out", metavar="FOLDER", help="folder of the files (exports/<run>-<network>-<format>)")
    export.set_defaults(command="export")


def _add_network(parser: argparse.ArgumentParser) -> None:
    """The options that choose a network of a run."""
    parser.add_argument("run", metavar="RUN", help="run id, or folder or address of a run")
    text = "number of the peer, or `ensemble`: weighted where the method has weights, else average"
    parser.add_argument("--peer", metavar="I", required=True, help=text)
    parser.add_argument("--epoch", metavar="N", type=int, help="epoch of a kept checkpoint (the one that was tested)")
    parser.add_argument("--trust", action="store_true", help="import and call code of your own that the run names")
    text = "folder or address that run ids are looked up below (results)"
    parser.add_argument("--storage-path", metavar="PATH", default="results", help=text)


def export_network(options: argparse.Namespace) -> int:
    """Run `wml-ray export`."""
    from rich.console import Console

    from wml_ray.cli.output import print_line
    from wml_ray.export.verify import rows
    from wml_ray.report.style import new_table
    from wml_ray.verbs.export import export

    network = chosen_network(options)
    exported = export(network, options.to, options.out, options.int8, options.max_drop)
    print_line(f"{network.info.title}, {exported.card['format']}")
    table = new_table("check", "in its own runtime, one thread")
    for row in rows(exported.verification):
        table.add_row(*row)
    Console().print(table)
    for name in exported.files:
        print_line(f"wrote {exported.folder / name}")
    if options.to == "onnx" and not options.int8:
        print_line(f"register it: wml-ray register {options.run} --peer {options.peer} --name NAME --alias champion")
    return OK


def chosen_network(options: argparse.Namespace) -> Network:
    """The network that `_add_network`'s options choose.

    Raises:
        UserError: there is no such run, peer or epoch.
    """
    from wml_ray.errors import UserError
    from wml_ray.export.network import load_network
    from wml_ray.storage.runs import find_run

    folder = find_run(options.run, options.storage_path)
    if folder is None:
        raise UserError(
            f"there is no run '{options.run}': no such folder, and no run of this id below {options.storage_path}; "
            "give its folder, or --storage-path"
        )
    choice = options.peer
    if choice != "ensemble" and not choice.isdigit():
        raise UserError(f"--peer {choice}: give the number of a peer, such as 0, or `ensemble`")
    return load_network(Path(folder), int(choice) if choice.isdigit() else choice, options.epoch, options.trust)
