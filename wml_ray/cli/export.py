"""The verbs that take a network out of a run: their options and output."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wml_ray.cli.choose import add_run_options, network_choice
from wml_ray.cli.exit_codes import OK

if TYPE_CHECKING:
    from wml_ray.verbs.export import Exported

DEFAULT_DROP = 0.02


def add_export(verbs: Any) -> None:
    """Add the verb `export`."""
    text = "write one network of a run as a file that is checked in its own runtime, with a model card"
    export = verbs.add_parser("export", help=text, description=text)
    _add_network(export)
    export.add_argument("--to", choices=("onnx", "pt2", "safetensors"), required=True, help="format of the file")
    _add_int8(export)
    export.add_argument("--out", metavar="FOLDER", help="folder of the files (exports/<run>-<network>-<format>)")
    export.set_defaults(command="export")


def add_register(verbs: Any) -> None:
    """Add the verb `register`."""
    text = "export one network of a run to ONNX, check it, and register it in MLflow's model registry"
    register = verbs.add_parser("register", help=text, description=text)
    _add_network(register)
    _add_int8(register)
    register.add_argument("--name", metavar="NAME", required=True, help="name of the registered model")
    register.add_argument("--alias", metavar="ALIAS", help="alias that is moved to the new version, such as champion")
    register.set_defaults(command="register")


def _add_int8(parser: argparse.ArgumentParser) -> None:
    text = "quantise the ONNX file to int8, calibrated on training images"
    parser.add_argument("--int8", action="store_true", help=text)
    text = "largest drop in validation accuracy that --int8 may cost (0.02)"
    parser.add_argument("--max-drop", metavar="SHARE", type=float, default=DEFAULT_DROP, help=text)


def _add_network(parser: argparse.ArgumentParser) -> None:
    """The options that choose a network of a run."""
    parser.add_argument("run", metavar="RUN", help="run id, or folder or address of a run")
    text = "number of the peer, or `ensemble`: weighted where the method has weights, else average"
    parser.add_argument("--peer", metavar="I", required=True, help=text)
    add_run_options(parser)


def export_network(options: argparse.Namespace) -> int:
    """Run `wml-ray export`."""
    from wml_ray.cli.output import print_line
    from wml_ray.export.network import load_network
    from wml_ray.verbs import export

    network = load_network(run_folder(options), network_choice(options.peer), options.epoch, options.trust)
    exported = export.export_network(network, options.to, options.out, options.int8, options.max_drop)
    _show(exported)
    for name in exported.files:
        print_line(f"wrote {exported.folder / name}")
    if options.to == "onnx":
        int8 = " --int8" * options.int8
        print_line(
            f"register    wml-ray register {options.run} --peer {options.peer}{int8} --name NAME --alias champion"
        )
    return OK


def register_network(options: argparse.Namespace) -> int:
    """Run `wml-ray register`."""
    from wml_ray.cli.output import print_line
    from wml_ray.export.network import load_network
    from wml_ray.tracking.client import redacted, tracking_uri
    from wml_ray.verbs.register import register

    folder = run_folder(options)
    network = load_network(folder, network_choice(options.peer), options.epoch, options.trust)
    model, exported = register(network, folder, options.name, options.alias, options.int8, options.max_drop)
    _show(exported)
    store = f"MLFLOW_TRACKING_URI={redacted(tracking_uri())}"
    print_line(f"registered  {model.name}, version {model.version}{f', alias {model.alias}' if model.alias else ''}")
    print_line(f"serve       {store} mlflow models serve -m {model.uri} --env-manager local -p 5001")
    return OK


def _show(exported: Exported) -> None:
    """Print the title of an exported network and how it was checked."""
    from rich.console import Console

    from wml_ray.cli.output import print_line
    from wml_ray.export.verify import rows
    from wml_ray.report.style import new_table

    print_line(f"{exported.card['title']}, {exported.card['format']}")
    table = new_table("check", "in its own runtime, one thread")
    for row in rows(exported.verification):
        table.add_row(*row)
    Console().print(table)


def run_folder(options: argparse.Namespace) -> Path:
    """The folder of the run that the options name.

    Raises:
        UserError: there is no such run.
    """
    from wml_ray.errors import UserError
    from wml_ray.storage.runs import find_run

    folder = find_run(options.run, options.storage_path)
    if folder is None:
        raise UserError(
            f"there is no run '{options.run}': no such folder, and no run of this id below {options.storage_path}; "
            "give its folder, or --storage-path"
        )
    return folder
