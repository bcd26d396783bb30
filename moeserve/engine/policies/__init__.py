"""What the scheduler asks others: small objects that choose, and know neither tensors nor clocks.

::

    choices.py      what it asks, as protocols; first come, first served
    past_future.py  requests as the memory lasts that their answers are foreseen to take
    shape.py        why a step has its shape
    targets.py      short prompts first, as many as a gap between tokens allows
    throughput.py   prompts as they pay, and requests as KV holds out (``--objective throughput``)
    drafts.py       guesses behind the newest tokens of a step, as many as fit
    fairness.py     of several tenants the one that was served least
    split.py        cores of the process that decodes, and of the one that computes prompts
    swap.py         a preempted request's KV copied to host memory, or computed again
    ngrams.py       guesses of what follows, from all that was written before
    made.py         guesses that steps made themselves, and how often they are right
    layered.py      prompts that go through the layers in groups, one a step (``--prefill-mode``)
    prefill_choice.py  which prompts do, by the experts that are loaded so
    speculation.py  how many of them a step checks: as many as make tokens come sooner
"""
