"""The links of a bed: their rates, cuts and counts, given the keepers' process ids.

Each command runs in a keeper's network namespace through ``nsenter``, ``ip`` and ``tc``.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from moeserve.errors import ConfigError, InternalError

COMMAND_S = 10.0

# What a port may hold back before it drops: more than the senders' windows together.
QUEUE_BYTES = 16 << 20
# Frames as on the networks of clusters: a timer for each small one would cost more than its bytes.
MTU = 9000
# A bucket that fills in so long, or with one frame, lets nothing noticeable through at once.
BURST_S = 50e-6
LEAST_BURST = 9100

UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
LEAST_RATE = 8000


@dataclass(frozen=True, slots=True)
class LinkCount:
    """What the kernel counted on a host's end of its link, headers included."""

    sent_bytes: int
    sent_packets: int
    received_bytes: int
    received_packets: int


def parse_rate(text: str) -> int | None:
    """Bits per second; None for ``unlimited``."""
    if text == "unlimited":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(bit|kbit|mbit|gbit)", text.lower())
    rate = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if rate < LEAST_RATE:
        raise ConfigError(
            f"rate {text!r}: expected a number with bit, kbit, mbit or gbit, such as 100mbit, not "
            "below 8kbit; or unlimited"
        )
    return rate


def show_rate(rate: int | None) -> str:
    if rate is None:
        return "unlimited"
    unit = next(u for u, bits in reversed(UNITS.items()) if rate >= bits)
    return f"{rate / UNITS[unit]:g}{unit}"


def connect(switch: int, host: int, pid: int, address: str) -> None:
    """A cable from the switch to the host whose keeper is ``pid``."""
    port = f"port{host}"
    run_in(switch, "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0",
           "netns", str(pid))  # fmt: skip
    run_in(switch, "ip", "link", "set", port, "master", "switch", "up", "mtu", str(MTU))
    run_in(pid, "ip", "address", "add", f"{address}/24", "dev", "eth0")
    run_in(pid, "ip", "link", "set", "eth0", "up", "mtu", str(MTU))


def limit(pid: int, device: str, rate: int | None) -> None:
    """Of what leaves through the device."""
    if rate is None:
        shape = ["noqueue"]
    else:
        burst = max(LEAST_BURST, int(rate / 8 * BURST_S))
        shape = ["tbf", "rate", f"{rate}bit", "burst", str(burst), "limit", str(QUEUE_BYTES)]
    run_in(pid, "tc", "qdisc", "replace", "dev", device, "root", *shape)


def set_port(switch: int, host: int, *, up: bool) -> None:
    """A port that is not up has left the switch but keeps its carrier: the host is not told."""
    change = ["master", "switch"] if up else ["nomaster"]
    run_in(switch, "ip", "link", "set", f"port{host}", *change)


def read_count(pid: int) -> LinkCount:
    answer = json.loads(run_in(pid, "ip", "-s", "-j", "link", "show", "dev", "eth0"))
    sent, received = answer[0]["stats64"]["tx"], answer[0]["stats64"]["rx"]
    return LinkCount(sent["bytes"], sent["packets"], received["bytes"], received["packets"])


def run_in(pid: int, *command: str) -> str:
    """Standard output of a command in the network of a process."""
    done = subprocess.run(
        ["nsenter", f"--net=/proc/{pid}/ns/net", *command],
        capture_output=True, text=True, timeout=COMMAND_S, check=False,
    )  # fmt: skip
    if done.returncode:
        raise InternalError(f"test bed: `{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


def entering(pid: int, folder: str) -> Sequence[str]:
    """What to put before a command so that it runs on the host of a keeper, in ``folder``."""
    return ["nsenter", "--target", str(pid), "--net", "--uts", "--ipc", "--mount",
            f"--wdns={folder}", "--"]  # fmt: skip
