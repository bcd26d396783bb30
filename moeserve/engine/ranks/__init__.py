"""Requests over several ranks.

::

    fleet.py          one scheduler per rank behind one queue; which rank is a request's home
    homes.py          homes near the experts that prompts use (expert_use: counts these)
    leader.py         rank 0: runs a step over all ranks
    follower.py       every other rank: runs what rank 0 orders
    messages.py       orders and reports of a step as protobuf
    microbatches.py   how many microbatches a step is cut into
"""
