"""How ranks come to be.

::

    environment                who this process is among the ranks, from its launcher's environment
    rendezvous                 how the ranks of a launch meet, and who shares a host with whom
    note_store                 the notes over gRPC: rank 0 keeps them, the others ask it
    notes                      notes in memory, bounded, and the store that torch asks
    spawn                      ranks as children of this process
"""
