"""How bytes travel between ranks. Knows no tokens.

::

    base  backend              the interface; what all backends keep
    open                       which backend carries bytes between these ranks
    local  shm  tcp            one rank with itself; ranks of a host; ranks of several hosts
    torch  mpi                 over torch.distributed and over MPI
    stragglers                 which ranks are late, where the medium does not say
"""
