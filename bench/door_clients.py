"""The clients of ``bench/doors.py``: many streams over raw sockets, in one process.

    python bench/door_clients.py {grpc|http} PORT,.. STREAMS TOKENS

Streams are dealt to the ports in turn. What is read is only counted: parsing every message, or
grpcio and httpx, would cost more than the door that is measured. Over HTTP every stream has a
connection; over gRPC up to ``PER_CONNECTION`` share one. Prints one object in JSON: seconds of the
monotonic clock at the end, CPU seconds since the first byte of an answer, messages that came.
AssertionError where a stream did not end with the tokens that it asked for.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import struct
import sys
import time
from typing import Protocol

from moeserve.pb import inference_pb2 as pb

PER_CONNECTION = 16
WAIT_S = 120.0
READ_BYTES = 1 << 18

DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 4, 6, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
WINDOW = (1 << 31) - 1


class Connection(Protocol):
    """What arrives on one socket; ``messages`` counts those that had tokens."""

    messages: int

    @property
    def ended(self) -> bool: ...

    def feed(self, data: bytes) -> bytes:
        """Takes what came; what is to be sent in return."""
        ...


class SseStream:
    """One completion as server-sent events."""

    _USAGE = re.compile(rb'"completion_tokens": ?(\d+)')

    def __init__(self, tokens: int) -> None:
        self.messages = 0
        self.ended = False
        self._tokens = tokens
        self._tail = b""

    def request(self) -> bytes:
        body = json.dumps(
            {
                "prompt": [1, 2, 3],
                "max_tokens": self._tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def feed(self, data: bytes) -> bytes:
        self.messages += (self._tail[-5:] + data).count(b"data: ")
        self._tail = (self._tail + data)[-1000:]
        if b"data: [DONE]" in self._tail:
            self.ended = True
            self.messages -= 2  # the usage, and this
            found = self._USAGE.search(self._tail)
            assert found and int(found[1]) == self._tokens, self._tail
        return b""


class GrpcConnection:
    """Several calls of Generate over HTTP/2: frames are told apart, and headers left unread."""

    def __init__(self, streams: int, tokens: int) -> None:
        self.messages = 0
        self._tokens = tokens
        self._received = b""
        self._rest = dict.fromkeys(range(1, 2 * streams, 2), b"")  # by stream, until it ends
        self._last: dict[int, bytes] = {}

    @property
    def ended(self) -> bool:
        return not self._rest

    def request(self) -> bytes:
        asked = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[1, 2, 3]),
            sampling=pb.SamplingParams(max_tokens=self._tokens, temperature=0, ignore_eos=True),
        ).SerializeToString()
        body = struct.pack(">BI", 0, len(asked)) + asked
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": "/moeserve.v1.Inference/Generate",
            ":authority": "localhost",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        head = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())
        calls = [
            _frame(HEADERS, END_HEADERS, stream, head) + _frame(DATA, END_STREAM, stream, body)
            for stream in self._rest
        ]
        settings = _frame(SETTINGS, 0, 0, struct.pack(">HI", 4, WINDOW))
        window = _frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW - 65535))
        return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + window + b"".join(calls)

    def feed(self, data: bytes) -> bytes:
        received, at, answer = self._received + data, 0, b""
        while len(received) - at >= 9:
            size = int.from_bytes(received[at : at + 3], "big")
            if len(received) - at < 9 + size:
                break
            kind, flags = received[at + 3], received[at + 4]
            stream = int.from_bytes(received[at + 5 : at + 9], "big")
            payload = received[at + 9 : at + 9 + size]
            at += 9 + size
            if kind == DATA:
                self._take(stream, payload)
            elif kind == HEADERS and flags & END_STREAM:
                self._end(stream)
            elif kind in (SETTINGS, PING) and not flags & ACK:
                answer += _frame(kind, ACK, 0, payload if kind == PING else b"")
        self._received = received[at:]
        return answer

    def _take(self, stream: int, payload: bytes) -> None:
        """Counts whole messages, and keeps the last."""
        rest = self._rest[stream] + payload
        while len(rest) >= 5 and len(rest) >= (end := 5 + int.from_bytes(rest[1:5], "big")):
            self._last[stream], rest = rest[5:end], rest[end:]
            self.messages += 1
        self._rest[stream] = rest

    def _end(self, stream: int) -> None:
        assert not self._rest.pop(stream)
        last = pb.GenerateChunk.FromString(self._last[stream])
        assert last.usage.completion_tokens == self._tokens, last


def _text(text: str) -> bytes:
    """HPACK's string literal without Huffman's code; short ones only."""
    assert len(text) < 127
    return bytes([len(text)]) + text.encode()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def connections(
    kind: str, ports: list[int], streams: int, tokens: int
) -> list[tuple[int, Connection, bytes]]:
    """Port, connection and first bytes of each."""
    found: list[tuple[int, Connection, bytes]] = []
    for p, port in enumerate(ports):
        left = len(range(p, streams, len(ports)))
        while left > 0:
            if kind == "http":
                sse = SseStream(tokens)
                found.append((port, sse, sse.request()))
                left -= 1
            else:
                calls = GrpcConnection(min(left, PER_CONNECTION), tokens)
                found.append((port, calls, calls.request()))
                left -= PER_CONNECTION
    return found


def main() -> None:
    kind, ports, streams, tokens = sys.argv[1:]
    opened = connections(kind, [int(p) for p in ports.split(",")], int(streams), int(tokens))
    selector = selectors.DefaultSelector()
    for port, connection, first in opened:
        link = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.sendall(first)
        selector.register(link, selectors.EVENT_READ, connection)
    cpu = None
    deadline = time.monotonic() + WAIT_S
    while selector.get_map():
        ready = selector.select(1.0)
        assert time.monotonic() < deadline, f"{len(selector.get_map())} streams have no end"
        for key, _ in ready:
            link, connection = key.fileobj, key.data
            assert isinstance(link, socket.socket)
            data = link.recv(READ_BYTES)
            assert data, "a door has hung up"
            if answer := connection.feed(data):
                link.sendall(answer)
            if connection.messages and cpu is None:
                cpu = time.process_time()
            if connection.ended:
                selector.unregister(link)
                link.close()
    report = {
        "ended_at": time.monotonic(),
        "cpu_s": time.process_time() - (cpu or 0.0),
        "messages": sum(connection.messages for _, connection, _ in opened),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
