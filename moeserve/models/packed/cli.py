"""``moeserve quantize --packed`` and ``--check``. Torch is imported where it is needed: a command's
options are also wanted for its help."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moeserve.errors import ConfigError

if TYPE_CHECKING:
    from moeserve.kernels.ops import Ops

Progress = Callable[[int, int], None]


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--packed",
        action="store_true",
        help="weights as the kernels want them, which start-up maps instead of copying; --scheme "
        "is as serve's --quantization then [auto]",
    )
    command.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="what --packed keeps floats in [auto: the checkpoint's]",
    )
    command.add_argument(
        "--for-device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="whose kernels --packed is for; no device is needed to pack for one [cpu]",
    )
    command.add_argument(
        "--check",
        action="store_true",
        help="write nothing: read a packed --model whole and compare its digests",
    )


def run(args: argparse.Namespace) -> int:
    """Where one of the two was given."""
    from moeserve.config.options import LoadOptions
    from moeserve.models.library import resolve_model
    from moeserve.models.packed.writer import pack_model

    if args.check:
        return _check(args)
    if args.quantize_head or args.group != 128:
        raise ConfigError(
            "--packed holds what loading would hold: --group and --quantize-head have no effect; "
            "quantize first, then pack the copy"
        )
    options = LoadOptions(
        dtype=args.dtype,
        quantization=args.scheme or "auto",
        quantize_attention=not args.keep_attention,
    )
    with _bar("packing") as progress:
        model = resolve_model(args.model)
        done = pack_model(model, args.out, packing_ops(args.for_device), options, progress=progress)
    if args.json:
        print(json.dumps(done.to_json()))
        return 0
    print(
        f"{done.folder}: {done.layers} layers, {done.records} expert records; "
        f"{done.bytes_before / 1e6:.1f} MB became {done.bytes_after / 1e6:.1f} MB"
    )
    return 0


def packing_ops(device: str) -> Ops:
    """The table that packs for a device. Triton's kernels read plain tensors, as the reference
    does, so that no device has to be there."""
    from moeserve.kernels.reference.ops import ReferenceOps
    from moeserve.kernels.select import choose_ops

    return ReferenceOps() if device == "cuda" else choose_ops()


def _check(args: argparse.Namespace) -> int:
    from moeserve.models.library import resolve_model
    from moeserve.models.packed.writer import verify_packed

    folder = resolve_model(args.model)
    with _bar("reading") as progress:
        regions = verify_packed(folder, progress)
    if args.json:
        print(json.dumps({"folder": str(folder), "regions": regions}))
    else:
        print(f"{folder}: {regions} regions are what was written")
    return 0


@contextmanager
def _bar(what: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda now, total: bar.update(task, completed=now, total=total)
