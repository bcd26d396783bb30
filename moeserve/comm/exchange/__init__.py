"""How bytes travel between ranks. Knows no tokens.

::

    base  backend              the interface; what all backends keep
    open  cards                which backend carries bytes between these ranks; whether they can
                               stay on the ranks' devices
    local  shm  tcp            one rank with itself; ranks of a host; ranks of several hosts
    torch  mpi                 over torch.distributed and over MPI
    collective  media          on devices, by collectives; what moves bytes there (NCCL, HCCL)
    mapped                     on devices of a host that write into one another's memory
    streams                    what a device has been given, and whether it has done it
    stragglers                 which ranks are late, where the medium does not say
"""
