"""Bounds and plans of one layer from its columns: sets of experts that a device may hold.

Grouping a layer is a set partition: each expert in one column, the cost of a column the tokens that
touch it. Its linear relaxation is almost tight, and any prices of experts at which no column is
cheaper than the experts in it are a bound on every plan (docs/placement.md).

::

    layer                      one layer's problem in whole numbers; what its bound says
    pricing  twin              columns below a price, covers by columns: native, or in Python
    master                     prices from the columns so far: HiGHS, or a simplex of ours
    pairs                      a bound on large groups, by semidefinite duality
    generation                 the search for a bound and a better cover, cut into short steps
    levels                     layers of a plan as such problems: devices, nodes, copies, limits
    certify                    all layers of a plan within a time limit
"""
