"""``python -m moeserve.worker``: this process as one of several ranks, under any launcher that
``comm.launch`` reads, with the settings of ``moeserve serve``, or where it has a role in a cluster
with those of ``moeserve peer``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from moeserve.comm.launch.environment import Launch, read_launch
from moeserve.config.cluster import PeerConfig
from moeserve.config.effect import require_effect
from moeserve.config.options import ServeConfig
from moeserve.config.sources import add_options, options_of, settings_from_args, to_yaml
from moeserve.errors import ConfigError, MoeserveError
from moeserve.gateway.server import serve
from moeserve.models.library import with_model_here
from moeserve.worker.peer import run_peer
from moeserve.worker.rank import run_rank
from moeserve.worker.start import RankStart


def main(argv: Sequence[str] | None = None) -> int:
    """Runs this rank; the exit status, as of ``moeserve serve``."""
    args = parser().parse_args(argv)
    try:
        settings = settings_from_args(args, os.environ)
        config = options_of(settings, PeerConfig if "role" in settings else ServeConfig)
        if args.print_config:
            print(to_yaml(config), end="")
            return 0
        launch = read_launch(os.environ)
        require_effect(config, settings, launch.world)
        return run(config, launch, os.environ)
    except ConfigError as error:
        print(f"moeserve: {error.message}", file=sys.stderr)
        return 2
    except MoeserveError as error:
        print(f"moeserve: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    worker = argparse.ArgumentParser(
        prog="moeserve.worker",
        description="Serve as one of several ranks, started by torchrun, mpirun, deepspeed or srun "
        "with the same settings on all; rank 0 opens the doors, or each (--doors all).",
        epilog="example: torchrun --nproc-per-node 2 -m moeserve.worker --model demo",
        allow_abbrev=False,
    )
    # The deepspeed launcher adds it, unless told --no_local_rank; LOCAL_RANK says the same.
    worker.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    add_options(worker, PeerConfig)
    return worker


def run(config: ServeConfig, launch: Launch, environ: Mapping[str, str]) -> int:
    """This rank, whichever it is; the exit status."""
    if config.ep is not None and config.ep != launch.world:
        raise ConfigError(
            f"ep={config.ep}, and the launcher ({launch.launcher}) started {launch.world} ranks: "
            "leave --ep away, it takes as many as were launched"
        )
    if not isinstance(config, PeerConfig) or config.weights == "disk":
        config = with_model_here(config)
    if launch.world == 1:
        return run_peer(config) if isinstance(config, PeerConfig) else serve(config)
    return run_rank(config, RankStart(launch, environ))
