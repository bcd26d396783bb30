"""How many connections the doors may hold, from how many descriptors the process may have.

Descriptors that run out end more than connections: files, pipes and sockets between ranks need them
too. So the doors share what is left after a reserve, and keep within it.
"""

from __future__ import annotations

import logging
import resource

from moeserve.errors import ConfigError

log = logging.getLogger(__name__)

# What is no connection of a client: files of the model, ranks, logs, pipes.
RESERVE = 128
RESERVE_SHARE = 8
# Of a door, however many descriptors there are: each costs memory, too.
MOST = 8192
LEAST = 8
_UNLIMITED = 1 << 20


def raise_descriptor_limit() -> None:
    """The soft limit to the hard one, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _UNLIMITED if hard == resource.RLIM_INFINITY else min(hard, _UNLIMITED)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:  # macOS has a bound of its own beside the hard one
        log.warning("the limit of open files stays at %d: %s", soft, error)


def connections_of_a_door(asked: int | None, doors: int) -> int:
    """How many connections each of ``doors`` may hold; ConfigError where ``asked`` are too many."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _UNLIMITED if soft == resource.RLIM_INFINITY else soft
    share = (limit - max(RESERVE, limit // RESERVE_SHARE)) // max(1, doors)
    if share < LEAST:
        raise ConfigError(f"only {limit} files may be open (ulimit -n): raise that to 1024 or more")
    if asked is not None and asked > share:
        raise ConfigError(
            f"max_connections={asked}: of {limit} files that may be open (ulimit -n) a door can "
            f"have {share} connections; raise that limit, or ask for fewer"
        )
    return min(MOST, share) if asked is None else asked
