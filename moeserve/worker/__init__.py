"""One rank of several: ``python -m moeserve.worker``."""
