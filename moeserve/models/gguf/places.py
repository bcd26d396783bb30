"""Whether a path leads to a GGUF file, and which files make one model.

A model may be split: ``NAME-00001-of-00003.gguf`` is then the first of three files, and stands for
all. No torch.
"""

from __future__ import annotations

import re
from pathlib import Path

from moeserve.errors import CheckpointError
from moeserve.models.files import open_regular
from moeserve.models.gguf.header import GgufHeader, read_gguf_header

ENDING = ".gguf"
MOST_PARTS = 1024
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def gguf_of(path: Path) -> Path | None:
    """The GGUF file at ``path``, or the only model of a folder that has nothing else of a model;
    of a split one its first file. None where there is none; CheckpointError where there are
    several."""
    if path.name.endswith(ENDING) and not path.is_dir():
        return _first(path)
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted({_first(file) for file in path.glob(f"*{ENDING}")})
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:3])
        raise CheckpointError(f"{path}: several models ({names}): give the path of one")
    return found[0] if found else None


def parts_of(first: Path) -> list[Path]:
    """All files of a model, the first of them first."""
    part = _PART.fullmatch(first.name)
    if part is None:
        return [first]
    count = int(part["count"])
    if not 1 <= count <= MOST_PARTS:
        raise CheckpointError(f"{first}: one of {count} files, at most {MOST_PARTS} are read")
    return [
        first.with_name(f"{part['stem']}-{number:05}-of-{count:05}{ENDING}")
        for number in range(1, count + 1)
    ]


def read_headers(first: Path) -> list[GgufHeader]:
    """Of all files of a model; CheckpointError where they do not belong together."""
    files = parts_of(first)
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{file}: missing, one of {len(files)} files of the model")
    headers = [read_gguf_header(file) for file in files]
    seen: set[str] = set()
    for number, header in enumerate(headers):
        count = header.values.get("split.count", 1)
        if count not in (0, len(files)) or header.values.get("split.no", 0) != number:
            raise CheckpointError(
                f"{header.file}: says that it is file {header.values.get('split.no', 0)} of "
                f"{count}, and its name says {number} of {len(files)}; give files their own names"
            )
        if twice := seen & header.tensors.keys():
            raise CheckpointError(
                f"{header.file}: tensor {min(twice)!r} is in another file of the model too"
            )
        seen |= header.tensors.keys()
    return headers


def header_bytes(file: Path) -> bytes:
    """All before a file's data, as it stands there."""
    header = read_gguf_header(file)
    try:
        with open_regular(file) as opened:
            return opened.read(header.nbytes)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error


def _first(file: Path) -> Path:
    part = _PART.fullmatch(file.name)
    if part is None:
        return file
    return file.with_name(f"{part['stem']}-00001-of-{part['count']}{ENDING}")
