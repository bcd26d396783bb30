"""Who holds which expert: from recorded routing to a plan with a proven gap. No torch.

::

    cluster  routing  plan     plain data: devices and links; what was routed; slots -> experts
    files                      bounds on what files of others hold, and reading within them
    problem                    what is asked of a solver, and what can be refused at once
    split                      which copy of a replicated expert a token uses: the runtime's rule
    layer_use  migration       where the tokens of a layer go; where a migrating token is after it
    cost                       balance and copies of a plan in each dataflow
    step_time                  balance and copies as one figure, by rates of experts and links
    report  pictures           the figures of a plan with its bound and gap; heat maps
    cli  commands              ``moeserve place``: the arguments; the verbs
    aside                      a plan solved in a process of low priority, beside one that serves
    formats/                   files of others, in and out
    solvers/                   how plans are found

Letters at the end of names are shapes, everywhere in this package: T tokens, L layers, K experts
chosen per token, E experts, S slots per layer, D devices, N nodes, W workloads, C sequences.
Slot ``s`` belongs to device ``s // (S / D)``, device ``d`` to node ``d // (D / N)``.
"""
