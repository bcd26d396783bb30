"""Requests over several ranks.

::

    fleet                      which rank runs which request: a scheduler per rank, one queue
    homes  expert_use          homes near the experts that a request will use; what they are
    leader  follower           rank 0, which decides and takes part; a rank that runs its orders
    messages                   what they send each other about a step
    microbatches               how many microbatches a step is cut into
"""
