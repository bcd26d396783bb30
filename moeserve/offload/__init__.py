"""Weights that are not all in memory: read from disk as steps need them, within a budget.

::

    mover        reads on threads of its own: needed now, or ahead; each wait has a deadline
    disk_file    a file of weights that must stay as it was: size, time, digests of its regions
    arena        memory that is read into, of the host or of a device
    residency    which experts stay in memory: pure decisions over slots
    experts      an arena of slots over all layers: a layer's experts, in waves as they come
    waves        a mixture made in parts, to the bits of all at once
    foresight    which experts of the next layer are worth reading ahead
    window       trunks of a few layers in memory, the others read as their turn comes
    runner       runs the layers of a step over all of this
    rank_experts  the same for one rank of several, in whose turn records come
    budget       what a process takes of a memory budget, and what that leaves to experts
    interpreter  whether the interpreter fits, before its libraries are imported
    process_memory  what it takes already, and in a step
    load         a packed folder as a decoder within a budget
    device_load  the same for a device that its experts do not fit
    device_mover  experts from disk to host memory, where they stay, and to a device's slots
    copies       copies to a device beside its kernels, and what orders the two
    model        the performance model, pure: what a machine and a model allow, and what binds
    checkpoint_demand  what the model in a folder asks of a machine, from headers alone
    calibrations  where measurements of this host are kept
    native       the native half (offload/*.cc), or why there is none
"""
