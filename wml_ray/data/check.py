"""Image files that cannot be decoded: all are found and listed before a run starts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from wml_ray.config.schema import DataConfig
from wml_ray.data.images import ImageListing, decode_reason, list_images, printable, read_image
from wml_ray.errors import UserError

SAMPLE = 64  # images that are decoded where only headers are checked
LISTED = 20  # images that a message names
CHUNK = 1024  # images handed to the threads at once
PROGRESS_S = 10.0  # between two progress lines where there is no terminal

OnProgress = Callable[[int, int], None]  # images done, images in all


def undecodable_images(config: DataConfig, decode_all: bool = False, show_progress: bool = False) -> dict[str, str]:
    """Images of an image folder that cannot be decoded: name below `data.root` -> reason. Empty for the other sets.

    By default every file's header and end are checked, and those that look damaged and a sample of 64 are decoded.
    `decode_all` decodes every file, with a progress bar on a terminal if `show_progress`, else with a line every 10 s.

    Raises:
        UserError: without data.skip_bad, if there are any; the message lists at most 20 of them, one a line.
    """
    if config.name != "imagefolder":
        return {}
    listing = list_images(config)
    bad = _find_undecodable(listing, config.max_pixels, decode_all, show_progress)
    if bad and not config.skip_bad:
        lines = [f"{printable(name)}: {reason}" for name, reason in list(bad.items())[:LISTED]]
        if len(bad) > LISTED:
            lines.append(f"and {len(bad) - LISTED:,} more")
        count = f"{len(bad):,} of {len(listing.samples):,} images"
        raise UserError(
            f"data.root = '{config.root}': {count} cannot be decoded; repair or remove them, or set data.skip_bad=true "
            "to leave them out:" + "".join(f"\n  {line}" for line in lines)
        )
    return bad


def _find_undecodable(listing: ImageListing, max_pixels: int, decode_all: bool, show_progress: bool) -> dict[str, str]:
    paths = [path for path, _ in listing.samples]
    sample = set(paths[:: max(1, len(paths) // SAMPLE)])
    bad: dict[str, str] = {}
    with progress("checking images", bar=show_progress) as on_progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), CHUNK):
            chunk = paths[start : start + CHUNK]
            for path, reason in zip(
                chunk, pool.map(partial(_damage, max_pixels, decode_all, sample), chunk), strict=True
            ):
                if reason:
                    bad[listing.name(path)] = reason
            on_progress(start + len(chunk), len(paths))
    return bad


def _damage(max_pixels: int, decode_all: bool, sample: set[str], path: str) -> str:
    """Why the file cannot be decoded; empty if it can, or if it was not decoded and looks whole."""
    try:
        if decode_all or path in sample or not _looks_whole(path, max_pixels):
            read_image(path, max_pixels)
    except (UserError, OSError) as error:
        return decode_reason(error.__cause__ or error)
    return ""


def _looks_whole(path: str, max_pixels: int) -> bool:
    """Whether a JPEG, PNG or WebP file starts and ends as its format requires. A False does not prove damage.

    False too for a PNG file with more than `max_pixels` pixels.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(24)
        file.seek(max(0, size - 12))
        tail = file.read()
    if head.startswith(b"\xff\xd8\xff"):
        return tail.endswith(b"\xff\xd9")
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
        return b"IEND" in tail and width * height <= max_pixels
    is_webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    return is_webp and int.from_bytes(head[4:8], "little") + 8 <= size


@contextmanager
def progress(title: str, bar: bool) -> Iterator[OnProgress]:
    """A progress bar on a terminal if `bar`; otherwise a plain line every 10 s."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if bar and console.is_terminal:
        with Progress(console=console, transient=True) as shown:
            task = shown.add_task(title, total=None)
            yield lambda done, total: shown.update(task, completed=done, total=total)
        return
    last_s = time.monotonic()

    def print_now_and_then(done: int, total: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= PROGRESS_S:
            last_s = time.monotonic()
            print(f"{title}: {done:,} of {total:,}", flush=True)

    yield print_now_and_then
