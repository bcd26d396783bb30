"""A member as a process of its own: joins a registry and beats until it is killed.

python beating_member.py REGISTRY NAME
"""

from __future__ import annotations

import asyncio
import sys

from moeserve.comm.control.rpc import Trust
from moeserve.pools.members import Member, MemberLoad, Role
from moeserve.pools.registry.connect import connect_registry
from moeserve.pools.registry.heartbeat import Heartbeat


async def main(where: str, name: str) -> None:
    registry = connect_registry([where], Trust(), b"")
    member = Member(name, name, Role.DECODE, "127.0.0.1:80")
    heartbeat = Heartbeat(registry, member, lambda: MemberLoad(running=1))
    heartbeat.start()
    print("joined" if await heartbeat.wait_joined(20.0) else heartbeat.error, flush=True)
    await asyncio.sleep(120.0)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
