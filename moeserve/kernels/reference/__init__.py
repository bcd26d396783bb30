"""The op table in plain torch: slow, obvious, and the oracle of every other backend (law 7).

::

    ops                        the op table
    products                   a matrix product for every kind of weight
    records                    plain weights over any memory that has their bytes
    kv                         the paged cache, and attention over it one query head at a time
    sampling                   from rows of logits to tokens
    wire  combine              dispatch and combine row by row; exact sums of contributions
"""
