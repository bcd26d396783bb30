"""A toy rank as a process of its own: it prints its port, and serves until it is killed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from toy_house import VOCAB, ToyHouse

from moeserve.comm.control.rpc import Trust, open_server
from moeserve.pools.kv.counters import KvCounters
from moeserve.pools.kv.mooncake import Mooncake
from moeserve.pools.kv.serve import KvServer
from moeserve.pools.members import ServedTerms


async def main() -> None:
    house = ToyHouse(step_s=0.02, chunk=4)
    mooncake = Mooncake("127.0.0.1") if "--mooncake" in sys.argv else None
    terms = ServedTerms("m", "model", VOCAB, 1024)
    kv = KvServer(house, terms, KvCounters(), mooncake=mooncake)
    server, port = open_server("127.0.0.1", Trust(), b"run", [kv.handlers()])
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
