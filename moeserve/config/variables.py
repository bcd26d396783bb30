"""Variables that begin like a setting's and are none: who reads each, and what it says.

``sources`` refuses any other ``MOESERVE_...`` that is no setting. ``OTHERS`` are not ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from moeserve.native import REQUIRE_NATIVE

# Read by comm.launch.rendezvous.
HOST_ID = "MOESERVE_HOST_ID"
# Read by comm.launch.environment.
LAUNCHER = "MOESERVE_LAUNCHER"

MEANING: Mapping[str, str] = {
    REQUIRE_NATIVE: "1: a native half that was not built is an error, instead of slower Python",
    HOST_ID: "names this host to the other ranks, instead of what the kernel says of it",
    LAUNCHER: "names the launcher that set `RANK` and `WORLD_SIZE`, for messages",
}
# Kubernetes sets these for every service, so also for one named "moeserve".
OTHERS = re.compile("MOESERVE_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_.*)?)")


def is_no_setting(variable: str) -> bool:
    return variable in MEANING or OTHERS.fullmatch(variable) is not None
