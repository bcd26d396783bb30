"""This process, and the ranks behind it, as what the dashboard shows.

A process by itself is one member; rank 0 of several asks the others what they have counted.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import fields

from moeserve.core import Counters
from moeserve.engine.build import LoadedModel
from moeserve.engine.loop import EngineLoad
from moeserve.gateway.dashboard.snapshot import ExpertLoads, Flow
from moeserve.pools.members import Member, MemberLoad, Report, Role, ServedTerms


class OwnProcess:
    """A ``SnapshotSource``. ``address`` is where clients come in; ``draining`` is asked for."""

    def __init__(self, loaded: LoadedModel, address: str) -> None:
        self._loaded = loaded
        self._address = address
        self._host = socket.gethostname()
        self._terms = ServedTerms(
            name=loaded.name,
            vocab=loaded.spec.vocab,
            max_model_len=loaded.max_model_len,
            block_size=loaded.block_size,
        )

    async def refresh(self) -> None:
        if self._loaded.ranks is not None:
            await self._loaded.ranks.refresh()

    def reports(self) -> Sequence[Report]:
        ranks = self._loaded.ranks
        if ranks is None:
            own = self._loaded.own_engine or self._loaded.engine
            return [self._report(0, 1, own.load())]
        counts = list(ranks.of_ranks)
        return [self._report(r, len(counts), found.load) for r, found in enumerate(counts)]

    def flows(self) -> Sequence[Flow]:
        """KV stays where it is."""
        return ()

    def experts(self) -> ExpertLoads | None:
        own, ranks = self._loaded.own.expert_counts, self._loaded.ranks
        if own is None:
            return None
        loads_LE = own.loads()
        if ranks is not None and (choices := ranks.expert_choices) is not None:
            loads_LE = choices.reshape(loads_LE.shape)
        return ExpertLoads(own.layers, loads_LE)

    def counts(self) -> Mapping[str, float]:
        ranks, engine = self._loaded.ranks, self._loaded.own_engine or self._loaded.engine
        found = engine.counters if ranks is None else ranks.counters
        return {f.name: getattr(found, f.name) for f in fields(Counters) if f.name != "finished"}

    def _report(self, rank: int, ranks: int, load: EngineLoad) -> Report:
        member = Member(
            id=f"{self._host}/{rank}",
            instance=self._host,
            role=Role.UNIFIED,
            address=self._address if rank == 0 else "",
            rank=rank,
            ranks=ranks,
            terms=self._terms,
        )
        return Report(
            member,
            MemberLoad(
                running=load.running,
                waiting=load.waiting,
                free_blocks=load.free_blocks,
                total_blocks=load.total_blocks,
                draining=not load.accepting,
            ),
        )
