"""Other implementations of ``moe_ffn``, as ``moeserve bench kernel --contenders`` reads them.

    python bench/peers/contenders.py > contenders.json
    moeserve bench kernel --contenders contenders.json

ggml and kt-kernel run in the venvs that ``install.py`` makes; one that is not installed is listed
with the reason, and becomes a row that says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from roster import HERE, HOME

from moeserve.bench.kernel import Contender


def contenders(home: Path) -> list[Contender]:
    """``home`` is the folder of the peers' venvs."""
    found = []
    for peer, venv, script, kind, precision, most_threads, more_cores in (
        ("ggml Q8_0", "llamacpp", "ggml_experts.py", "q8_0", "int8", 1 << 10, 0),
        ("ggml Q4_0", "llamacpp", "ggml_experts.py", "q4_0", "int4", 1 << 10, 0),
        ("kt-kernel int8", "kt", "kt_experts.py", "int8", "int8", 1, 1),
    ):
        python = home / venv / "bin" / "python"
        absent = "" if python.exists() else f"absent: python bench/peers/install.py {venv}"
        command = (str(python), str(HERE / script), kind)
        found.append(Contender(peer, precision, command, most_threads, more_cores, absent))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, default=HOME, help=f"of the peers' venvs [{HOME}]")
    args = parser.parse_args()
    json.dump([asdict(one) for one in contenders(args.home)], sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
