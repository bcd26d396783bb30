"""How ranks come to be.

::

    environment                who this process is among the ranks, from its launcher's environment
    rendezvous                 how the ranks of a launch meet, and who shares a host with whom
    spawn                      ranks as children of this process
"""
