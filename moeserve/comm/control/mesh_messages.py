"""The messages of the mesh, as ``comm/mesh.cc`` explains them: kinds, bounds, and what is refused.

A message is a header (kind, length of its body, a number) and a body, little-endian.
"""

from __future__ import annotations

import struct
from enum import IntEnum

HEADER = struct.Struct("<IIQ")
# Who asks, and for which time; who answers.
QUESTION = struct.Struct("<II")
ANSWER = struct.Struct("<III")
LONGEST_ACTIVITY = 200
LONGEST_REASON = 4096
MOST_BLAMED = 1024


class Kind(IntEnum):
    ROUND = 1
    BEGUN = 2
    BEAT = 3
    ALARM = 4
    END = 5
    STOP = 6
    ASK = 7
    ABSENT = 8


class ProtocolError(Exception):
    """What a neighbour sent that may not be; it is cut off."""


def check_header(
    kind: int, length: int, number: int, step_bytes: int, last_round: int, posted: int
) -> None:
    """ProtocolError where a message with this header may not be.

    ``step_bytes`` is what the stream's step carries, ``last_round`` the last round that came on
    it, ``posted`` the last round of this rank.
    """
    alarm = 4 + 4 * MOST_BLAMED + LONGEST_REASON
    rules = {
        Kind.ROUND: ("records", step_bytes, step_bytes, "round"),
        Kind.BEGUN: ("word of a round", 0, 0, "word of round"),
        Kind.BEAT: ("a heartbeat", 0, LONGEST_ACTIVITY, ""),
        Kind.ALARM: ("an alarm", 4, alarm, ""),
        Kind.END: ("the end", 0, 0, ""),
        Kind.STOP: ("the end", 0, 0, ""),
        Kind.ASK: ("a question", QUESTION.size, QUESTION.size, "a question about round"),
        Kind.ABSENT: ("an answer", ANSWER.size, ANSWER.size, ""),
    }
    if kind not in rules:
        raise ProtocolError(f"a message of unknown kind {kind}")
    what, least, most, numbered = rules[Kind(kind)]
    if not least <= length <= most:
        raise ProtocolError(f"{what} of {length} bytes")
    out_of_turn = kind == Kind.ROUND and number != last_round + 1
    if numbered and (number > posted + 1 or out_of_turn):
        raise ProtocolError(f"{numbered} {number} while this one is at {posted}")


def shortened(text: bytes, most: int) -> bytes:
    """At most so many bytes, not ending within a character of UTF-8."""
    while most < len(text) and most > 0 and text[most] & 0xC0 == 0x80:
        most -= 1
    return text[:most]
