"""How cores are shared by the process that decodes and the one that computes prompts.

Who is alone has all of them; a step keeps what it began with. Where both run, prompts have
``share``, and newest tokens the rest, at least one each: half at first. With targets of latency the
share follows who misses them (semi-PD, arXiv:2504.19867): in a window of first tokens and gaps it
is counted how many were late, and where one kind is late more often than one in twenty and the
other is not, a core goes over to it. It takes two windows in a row that say so (hysteresis), and
where both are late, or neither, nothing moves. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from moeserve.engine.policies.targets import LatencyTargets

# A window ends with so many first tokens, or so many gaps.
FIRST_TOKENS, GAPS = 16, 512
# One in so many may be late.
ONE_IN = 20


class CoreShare:
    """Of ``total`` cores. One thread calls."""

    def __init__(self, total: int, targets: LatencyTargets) -> None:
        assert total > 0, total
        self.total = total
        self.share = max(1, total // 2)
        self._targets = targets
        self._firsts = self._late = self._gaps = self._over = 0
        self._wanted = 0  # what the window before said: a core more for prompts, or one less

    def here(self, *, prompts: bool) -> int:
        """For newest tokens, with or without prompts elsewhere."""
        return max(1, self.total - self.share) if prompts else self.total

    def elsewhere(self, *, newest: bool) -> int:
        """For prompts, with or without newest tokens."""
        return self.share if newest else self.total

    def note_first(self, seconds: float) -> None:
        """A first token came after so long."""
        target = self._targets.ttft_s
        self._firsts += 1
        self._late += target is not None and seconds > target
        if self._firsts >= FIRST_TOKENS:
            self._end_window()

    def note_gaps(self, gaps: Mapping[float, int]) -> None:
        """How many tokens came so many seconds after the one before."""
        target = self._targets.tpot_s
        self._gaps += sum(gaps.values())
        if target is not None:
            self._over += sum(count for seconds, count in gaps.items() if seconds > target)
        if self._gaps >= GAPS:
            self._end_window()

    def _end_window(self) -> None:
        late = self._late * ONE_IN > self._firsts
        over = self._over * ONE_IN > self._gaps
        wanted = int(late) - int(over)
        if wanted and wanted == self._wanted:
            most = max(1, self.total - 1)
            self.share = min(max(1, self.share + wanted), most)
            wanted = 0
        self._wanted = wanted
        self._firsts = self._late = self._gaps = self._over = 0
