"""Another placement of experts while serving: layer by layer, without stopping.

::

    switch.py           how ranks agree on the step before which a layer changes
    messages.py         what rank 0 and the ranks tell each other, as JSON has it
    swapper.py          every rank: reads a layer's experts beside the steps, swaps them in
    peers.py            how rank 0 reaches the ranks, beside the steps
    coordinator.py      rank 0: a plan comes into use layer by layer
    routing_counts.py   every rank: what its tokens' routing was
    benefit.py          whether a new plan pays
    candidates.py       one made and judged on a sample, and made again from all of it
    replanner.py        every so often: count, solve, propose what pays
    replay.py           recorded traffic through that policy, beside doing nothing and hindsight
    replay_command.py   ``moeserve place replay``; replay_plot: the same over time, as SVG
    live.py             these put together on rank 0, and a plan file read again
"""
