"""From loads and routing to a plan.

::

    robust                     how cautious to be, chosen on parts that were left out; falls back
    folds  covariance          these parts; how experts' loads rise and fall together
    portfolio                  chooses and runs the solvers below, within a time limit
    balance  grouping          one layer at a time: even load; co-activated experts together
    annealing  search  twin    the annealed search of grouping as data; its loops, native or numpy
    align  polish              across layers, for tokens that migrate: heuristics, integer program
    dp  ilp                    exact methods: dynamic programming, integer programs (PuLP)
    eplb  moetuner             baselines, written anew from their descriptions
    bounds                     what no plan can beat, at once
    columns/                   the same by column generation, and better layers on the way
"""
