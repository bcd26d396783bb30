"""What ranks send each other beside tokens.

::

    link  channels             one connection with deadlines; the star of them around rank 0
    handshake                  all ranks must serve the same before a step is run
    heartbeat  silence         that the others live; which have been silent for too long
"""
