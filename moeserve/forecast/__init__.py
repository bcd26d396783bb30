"""What a host would make of a model, said beforehand: measure the host, predict the model.

::

    command       what ``moeserve doctor`` takes for both, and how it does them
    calibrate     this host, measured: a ``MachineModel`` that is kept
    shapes        the sizes that kernels are measured at
    kernels       what products and attention cost here
    kernel_costs  the same by kind, looked at again and again
    disk          how fast a file is read
    beside        how much slower that and products are at once
    steps         real steps, timed, and Python's part of them
    rest          what steps cost beside products and attention
    habits        how often a request's tokens choose alike
    streaming     what experts that are read cost beside the reading
    first_layers  a few layers of the model, to see what one costs
    timing        one call, timed
    predictions   what fits, what binds, how fast, and what would give more
    drafts        what the model that drafts takes of memory
    step_costs    what steps will cost, for a scheduler that has not measured any
    targets       which targets of latency would be missed
    shown         the same as tables
"""
