"""Moving tokens between the ranks that serve a model together, and keeping these ranks in step.

::

    group.py        the ranks of a run, their nodes (Topology), and the notes they leave at start
    launch/         environment: what a launcher's variables say; rendezvous: how ranks meet;
                    note_store, notes: what they leave for one another, and who may read it;
                    spawn: ranks as children of this process
    control/        handshake: all serve the same; mesh: records of steps, who is lost, who wants to
                    stop; rpc: gRPC between processes, and whom they trust
    exchange/       base: rounds of bytes between ranks (Exchange, Lanes); local, shm, tcp, torch,
                    mpi: its backends over the host's memory; collective, media, mapped: over that
                    of devices; cards: whether these can; streams: what a device was given;
                    backend: what all share; stragglers: who is late; open: which one is taken
    connecting.py   connections between ranks beside strangers, all handshakes at once; proofs.py:
                    what both ends of one prove
    layout.py       where the experts of every layer lie; how many slots a record can number
    table.py        which copies of a batch's tokens go where (assign.py: the numpy twin);
                    device_table.py: found on the device
    dispatcher.py   one MoE layer over ranks: dispatch, experts, combine
    libraries/      dispatch and combine by DeepEP and by torch_npu, where they are asked for
    pipeline.py     all layers of a step, microbatches in turn
    build.py        from a loaded model and its group to a runner of its layers
    native.py       the native half (comm/*.cc): table, shared memory, sockets, mesh
"""
