"""``python -m moeserve.worker``: this process is one rank."""

from moeserve.worker.command import main
from moeserve.worker.failure import leave

if __name__ == "__main__":
    leave(main())
