"""Workers of several runs at once, forked from one process that has imported everything.

    python forked_workers.py RUNS.json OUT_FOLDER

``RUNS.json`` is a list of [environ, flags], one a worker; what each says on standard error goes to
``OUT_FOLDER/N.txt``. The exit statuses are printed in order, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from moeserve.worker.command import main
from moeserve.worker.failure import leave


def work(environ: dict[str, str], flags: list[str], said: Path) -> None:
    """One worker; never returns."""
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(environ)
    try:
        leave(main(flags))
    finally:
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    children = []
    for number, (environ, flags) in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        if (pid := os.fork()) == 0:
            work(environ, flags, Path(sys.argv[2]) / f"{number}.txt")
        children.append(pid)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]))
