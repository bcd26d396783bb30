"""The signatures of the operators that ``calls`` uses, as the pinned torch_npu wheel has them.

``schemas.txt`` holds one line each, with the wheel's version in its head. A wheel carries its
schemas as strings of ``libtorch_npu.so``, which can be read without CANN and without loading it:

    python -m moeserve.kernels.ascend.schemas torch_npu-2.13.0-cp311-...whl > schemas.txt

prints the file anew.
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

from moeserve.errors import ConfigError
from moeserve.kernels.ascend.calls import CALLED

FILE = Path(__file__).with_name("schemas.txt")
LIBRARY = "torch_npu/lib/libtorch_npu.so"
HEAD = (
    "# Operators of torch_npu {version}, read from its wheel by `moeserve.kernels.ascend.schemas`."
)


def read_schemas(file: Path = FILE) -> dict[str, str]:
    """By operator."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return {line.partition("(")[0]: line for line in lines if line and not line.startswith("#")}


def version_of_schemas(file: Path = FILE) -> str:
    found = re.search(r"torch_npu ([\d.]+),", file.read_text(encoding="utf-8"))
    assert found, file
    return found[1]


def schemas_of(wheel: Path) -> dict[str, str]:
    """From the strings of the wheel's library. ConfigError where an operator is not among them."""
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read(LIBRARY)
    found = {}
    for name in CALLED:
        pattern = rb"(?<=\0)" + name.encode() + rb"\([ -~]+\) -> [ -~]+(?=\0)"
        texts = {text.decode() for text in re.findall(pattern, library)}
        texts = {text for text in texts if "SymIntArrayRef" not in text and "int64_t" not in text}
        if len(texts) != 1:
            raise ConfigError(f"{wheel.name} has {len(texts)} schemas of {name}: expected one")
        found[name] = texts.pop()
    return found


def main(wheel: str) -> None:
    version = Path(wheel).name.split("-")[1]
    print(HEAD.format(version=version), *schemas_of(Path(wheel)).values(), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
