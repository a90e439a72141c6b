"""The verb that turns an image folder into shards: its options and output."""

from __future__ import annotations

import argparse
from typing import Any

from wml_ray.cli.exit_codes import OK


def add_shard(verbs: Any) -> None:
    """Add the verb `shard`."""
    text = "write an image folder as tar files with an index, which data.name=shards streams; continues after a kill"
    parser = verbs.add_parser("shard", help=text, description=text)
    parser.add_argument("folder", metavar="FOLDER", help="image folder: train/<class>/, and test/ or val/")
    parser.add_argument("target", metavar="TARGET", help="folder or address of the set, such as s3://BUCKET/SET")
    parser.add_argument("--shard-mb", metavar="MB", type=int, default=64, help="size of a shard, from 1 to 512 MB (64)")
    text = "resize images whose shorter side has more pixels to N, as JPEG of quality 95; others are copied unchanged"
    parser.add_argument("--resize", metavar="N", type=int, help=text)
    text = "leave out images that cannot be decoded, and record them in the index"
    parser.add_argument("--skip-bad", action="store_true", help=text)
    parser.set_defaults(command="shard")


def shard_images(options: argparse.Namespace) -> int:
    """Run `wml-ray shard`."""
    from wml_ray.cli.output import print_line
    from wml_ray.errors import number_of
    from wml_ray.verbs.shard import shard

    header = shard(options.folder, options.target, options.shard_mb, options.resize, options.skip_bad)
    size_mb = sum(part.bytes for part in header.shards) / 1e6
    print_line(f"wrote {number_of(len(header.shards), 'shard')}, {size_mb:,.1f} MB, to {options.target}")
    if header.skipped:
        print_line(f"left out {number_of(len(header.skipped), 'image')} that cannot be decoded; shards.json lists them")
    print_line(f"train       wml-ray train CONFIG data.name=shards data.root={options.target}")
    return OK
