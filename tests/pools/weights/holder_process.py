"""A member that has a checkpoint, as a process: ``holder_process.py FOLDER FLIPS PAUSE_S``.

Says its port when it can be asked. The first FLIPS chunks that it sends have changed on their way,
and each takes PAUSE_S."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from moeserve.comm.control.rpc import Trust, open_server
from moeserve.pools.cache.keys import PageKey
from moeserve.pools.cache.pages import StoredPage
from moeserve.pools.weights.counts import WeightCounts
from moeserve.pools.weights.manifest import manifest_of, offer_key
from moeserve.pools.weights.offers import HeldCheckpoint, WeightServer


class FaultyCheckpoint(HeldCheckpoint):
    """One whose bytes change between it and the wire."""

    flips = 0
    pause_s = 0.0

    def read(self, key: PageKey) -> StoredPage | None:
        page = super().read(key)
        if page is None or key == offer_key(""):
            return page
        time.sleep(self.pause_s)
        if self.flips:
            self.flips -= 1
            body = bytearray(page.body)
            body[len(body) // 2] ^= 1
            return StoredPage(page.key, page.namespace, page.digest, bytes(body))
        return page


class FaultyServer(WeightServer):
    def _open(self) -> HeldCheckpoint:
        held = FaultyCheckpoint(manifest_of(self._folder, self._name), self._counts)
        held.flips, held.pause_s = int(sys.argv[2]), float(sys.argv[3])
        return held


async def main() -> None:
    held = FaultyServer(Path(sys.argv[1]), "demo", WeightCounts())
    server, port = open_server("127.0.0.1", Trust(), b"run", [held.handlers()])
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination(120.0)


if __name__ == "__main__":
    asyncio.run(main())
