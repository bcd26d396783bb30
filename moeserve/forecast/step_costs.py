"""What steps of a model will cost here, for a scheduler that has not measured any.

From the calibration of this host for this very shape of model; a broken one is said in the log, and
is as if there were none.
"""

from __future__ import annotations

import logging

from moeserve.config.options import EngineOptions
from moeserve.errors import ConfigError
from moeserve.forecast.command import threads_and_isa
from moeserve.forecast.shapes import shapes_of
from moeserve.kernels.select import choose_ops
from moeserve.models.library import resolve_model
from moeserve.offload.calibrations import calibration_folder, find, host_name
from moeserve.offload.checkpoint_demand import demand_of, stored_sizes
from moeserve.offload.model.predict import StepPredictor


def predicted_steps(options: EngineOptions) -> StepPredictor | None:
    """None where nobody asks (``--objective throughput`` does), the model is not on the CPU and all
    in memory, or this host was not measured for it."""
    if options.objective != "throughput" or options.memory is not None or options.device != "cpu":
        return None
    try:
        sizes = stored_sizes(resolve_model(options.model), options)
        ops = choose_ops(threads=options.threads)
        shapes, threads = shapes_of(sizes.spec).name, threads_and_isa(ops)[0]
        machine = find(calibration_folder(), host_name(), threads, shapes)
        if machine is None:
            return None
        predictor = StepPredictor(
            machine, demand_of(sizes, options, ops).with_habits(machine.habits)
        )
        predictor.seconds(1, 1, 1)  # all kinds of weights and KV were measured, or it is said
    except ConfigError as problem:
        logging.getLogger("moeserve.forecast").warning("steps are not predicted: %s", problem)
        return None
    return predictor
