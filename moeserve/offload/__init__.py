"""Weights that are not all in memory: read from disk as steps need them, within a budget.

::

    mover        reads on threads of its own: needed now, or ahead; each wait has a deadline
    disk_file    a file of weights that must stay as it was: size, time, digests of its regions
    experts      an arena of slots over all layers: a layer's experts, in waves as they come
    residency    which experts stay in memory: pure decisions over slots
    native       the native half (offload/*.cc), or why there is none
"""
