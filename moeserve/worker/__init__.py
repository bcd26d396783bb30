"""One rank of several: ``python -m moeserve.worker`` with the settings of ``moeserve serve``, under
any launcher that ``comm.launch`` reads; and ``moeserve serve --ep N``, which launches its own.

    command        the command line of a rank: one of several, or alone
    local          serve --ep N: rank 0 here, the others as children
    start          ranks meet, find that they will serve the same, and reach one another
    rank           meet, load, serve, and leave together with the others
    load_progress  progress of loading, through which it is interrupted
    failure        what the loss of a rank leads to
"""
