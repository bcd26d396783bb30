"""``python -m moeserve.worker``: this process is one rank."""

from moeserve.worker.command import leave, main

if __name__ == "__main__":
    leave(main())
