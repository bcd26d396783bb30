"""Server-sent events out of bytes, as the WHATWG's standard reads them; pure.

Only ``data`` is of interest here: of an event with several lines of it, they are joined by a line
feed. Events of more than ``MOST_BYTES`` are RequestFailed.
"""

from __future__ import annotations

from moeserve.bench.serving.outcomes import RequestFailed

MOST_BYTES = 4 << 20


class SseReader:
    """Takes what comes, however it is cut, and gives the data of every event that is complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._held = 0  # bytes of ``_data``

    @property
    def empty(self) -> bool:
        """Nothing was begun and not ended."""
        return not (self._rest or self._data)

    def feed(self, received: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + received).split(b"\n")
        events: list[bytes] = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data, self._held = [], 0
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
                self._held += len(line)
            # Comments, ids, names of events and what no one knows is left out.
        if len(self._rest) + self._held > MOST_BYTES:
            raise RequestFailed("bad stream", f"an event has more than {MOST_BYTES} bytes")
        return events
