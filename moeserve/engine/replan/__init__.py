"""Another placement of experts while serving: layer by layer, without stopping.

::

    switch.py           a change of plan, as decisions: what to prepare and when to switch
    coordinator.py      rank 0: a plan becomes notes that travel with steps
    swapper.py          every rank: reads a layer's experts beside the steps, swaps them in
    routing_counts.py   every rank: what its tokens' routing was
    benefit.py          whether a new plan pays
    replanner.py        every so often: count, solve, propose what pays
    live.py             these put together on rank 0, and a plan file read again
"""
