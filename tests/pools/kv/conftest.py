"""The toy rank, which test modules here import by its name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_PATH = Path(__file__).with_name("toy_house.py")
if "toy_house" not in sys.modules:
    _SPEC = importlib.util.spec_from_file_location("toy_house", _PATH)
    assert _SPEC is not None
    assert _SPEC.loader is not None
    sys.modules["toy_house"] = _MODULE = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(_MODULE)
