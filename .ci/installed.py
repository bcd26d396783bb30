"""The installed wheel serves: run by ``.ci/run`` in a fresh environment, away from the checkout.

``installed.py CHECKOUT`` ends with an error unless the package, its native module and its model
come from this environment and the console script does the main job.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any


def require(holds: bool, problem: str) -> None:
    if not holds:
        raise SystemExit(f"installed.py: {problem}")


def origin(module: str) -> Path:
    file = importlib.import_module(module).__file__
    require(file is not None, f"{module} has no file")
    return Path(file or "").resolve()


def ask(*words: str, statuses: tuple[int, ...] = (0,)) -> str:
    script = Path(sysconfig.get_path("scripts")) / "moeserve"
    done = subprocess.run(
        [script, *words], capture_output=True, text=True, timeout=180, check=False
    )
    command = f"moeserve {' '.join(words)}"
    require(done.returncode in statuses, f"{command}: {done.returncode}\n{done.stderr}")
    return done.stdout


def main(checkout: Path) -> None:
    home = Path(sysconfig.get_path("purelib")).resolve()
    for module in ("moeserve", "moeserve.kernels.cpu._cpu", "moeserve.pb.inference_pb2"):
        found = origin(module)
        require(found.is_relative_to(home), f"{module} comes from {found}, not from {home}")
        require(not found.is_relative_to(checkout), f"{module} comes from the checkout")

    version = importlib.import_module("moeserve").__version__
    require(ask("--version").split()[-1] == version, f"--version does not say {version}")

    prompt = ("--prompt", "Once upon a time", "--max-tokens", "16", "--temperature", "0")
    answer: dict[str, Any] = json.loads(ask("generate", "--model", "demo", *prompt, "--json"))
    require(len(answer["token_ids"]) == 16, f"16 tokens expected: {answer}")
    require(bool(answer["text"].strip()), f"no text: {answer}")

    # Status 1: a port may be taken here, and nothing is served.
    report = json.loads(ask("doctor", "--model", "demo", "--json", statuses=(0, 1)))
    require(report["software"]["native"], "doctor does not see the native half")
    require(report["model"] is not None, f"doctor refuses the demo model: {report['problems']}")
    print(f"moeserve {version} from {home}: {answer['text']!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
