"""Prompts in a process of their own, over the weights and KV of the one that decodes.

::

    scheduler.py      two steps under way that share no request, and who holds their blocks
    steps.py          the engine's turns: newest tokens here, prompts elsewhere meanwhile
    process.py        the other process seen from here: started, asked, begun anew
    worker.py         the other process itself
    messages.py       steps and results between the two
    table.py          the op table of both, over KV in shared memory
    build.py          what ``--split semi`` needs, and an engine with it
"""
