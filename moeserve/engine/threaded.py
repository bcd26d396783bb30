"""An executor on a thread of its own, so that a step runs while the next one is planned.

What a device does by itself: steps wait in a queue, and the newest tokens of one that was planned
ahead are those that the step before has sampled. On a CPU whose kernels take all cores the plan
takes from them what it saves (``bench/ahead.py``): engines there use their executor as it is.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from moeserve.core import Chunk, RequestId, StepPlan, StepResult
from moeserve.engine.executor import Executor
from moeserve.errors import UnavailableError

STEP_S = 600.0


class ThreadedExecutor:
    """A ``StartingExecutor``. Ahead of the scheduler it keeps what its requests have made: chunks
    reach ``inner`` with these lists as their ``output_ids``."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self._thread = ThreadPoolExecutor(1, "moeserve-steps")
        self._started: deque[Future[StepResult]] = deque()
        self._outputs: dict[RequestId, list[int]] = {}  # of the thread

    def run(self, plan: StepPlan) -> StepResult:
        assert not self._started, "other steps are to be finished first"
        self.start(plan)
        return self.finish()

    def start(self, plan: StepPlan) -> None:
        assert len(self._started) == int(plan.ahead), "one step at most may be under way"
        self._started.append(self._thread.submit(self._run, plan))

    def finish(self) -> StepResult:
        try:
            return self._started.popleft().result(STEP_S)
        except TimeoutError as error:
            raise UnavailableError(f"a step has taken more than {STEP_S:.0f} s") from error

    def close(self) -> None:
        """No further step is started."""
        self._thread.shutdown()

    def _run(self, plan: StepPlan) -> StepResult:
        outputs = self._outputs
        for request_id in plan.preempted + plan.ended:
            outputs.pop(request_id, None)
        filled = tuple(self._filled(chunk, ahead=plan.ahead) for chunk in plan.chunks)
        result = self._inner.run(replace(plan, chunks=filled))
        assert result is not None, "a process by itself runs every step"
        for sampled in result.sampled:
            outputs[sampled.request_id] += sampled.token_ids
        for request_id, _ in result.failed:
            outputs[request_id].append(0)  # for the row that nobody wants any more
        return result

    def _filled(self, chunk: Chunk, *, ahead: bool) -> Chunk:
        made = self._outputs.setdefault(chunk.request.id, [])
        if ahead:
            return chunk._replace(token_ids=(made[-1],), output_ids=made)
        made += chunk.output_ids[len(made) :]  # where none is ahead, nobody adds to it meanwhile
        return chunk._replace(output_ids=made)
