"""A member of the cache pool as a process: ``python cache_process.py FOLDER MEMORY DISK``. Says its
port when it can be asked; ends on SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from moeserve.comm.control.rpc import Trust, open_server
from moeserve.pools.cache.service import CacheServer
from moeserve.pools.cache.store import PageStore, StoreLimits


async def serve(folder: Path, memory: int, disk: int) -> None:
    store = await PageStore.open(StoreLimits(memory, disk), folder)
    server, port = open_server("127.0.0.1", Trust(), b"run", [CacheServer(store).handlers()])
    await server.start()
    end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set)
    print(port, flush=True)
    await end.wait()
    await server.stop(1.0)
    await store.close()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
