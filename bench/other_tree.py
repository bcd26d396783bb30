"""Runs a script with the package of another tree: ``python other_tree.py TREE SCRIPT [WORD ...]``.

An editable installation has a finder that comes before every path, so a path alone would give the
code of this tree under the other's name. What is imported in the end must lie in ``TREE``.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path


def main() -> None:
    tree, script = Path(sys.argv[1]).resolve(), sys.argv[2]
    sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
    sys.path.insert(0, str(tree))
    found = Path(str(import_module("moeserve").__file__))
    if tree not in found.parents:
        raise SystemExit(f"{tree} holds no moeserve: {found} was imported")
    del sys.argv[:2]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
