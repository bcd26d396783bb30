"""Opening files that a stranger may have put there: a pipe or a device is not waited for.

Standard library only; what is wrong is for the caller to say.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(file: Path) -> BinaryIO | None:
    """The file, to be read; None where it is no regular one. Links are followed. OSError."""
    opened = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        return None
    return os.fdopen(opened, "rb")
