"""Who holds which expert: from recorded routing to a plan with a proven gap. No torch.

::

    cluster  routing  plan        plain data: devices; what was routed; slots -> experts
    inputs  torchfile  exchange    files in (ours, SGLang, vLLM) and out (SGLang, Ascend, TRT-LLM)
    cost  bounds                   what a plan costs in each dataflow; what none can beat
    search  twin                   the hot loops: native where built, else their numpy twins
    eplb  balance  grouping        one layer at a time
    align  dp  ilp  moetuner       across layers; exact methods
    solve  report                  the portfolio under a time limit; the figures of a plan
    pictures  cli                  heat maps; ``moeserve place``

Letters at the end of names are shapes, everywhere in this package: T tokens, L layers, K experts
chosen per token, E experts, S slots per layer, D devices, N nodes, W workloads, C sequences.
Slot ``s`` belongs to device ``s // (S / D)``, device ``d`` to node ``d // (D / N)``.
"""
