"""``moeserve bench``: our runtime and its kernels beside what the machine could do, and others."""
