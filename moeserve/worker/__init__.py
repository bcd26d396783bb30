"""One rank of several: ``python -m moeserve.worker`` with the settings of ``moeserve serve``, under
any launcher that ``comm.launch`` reads; and ``moeserve serve --ep N``, which launches its own.

    command        the command line of a rank: whether it leads, follows, or serves alone
    local          serve --ep N: rank 0 here, the others as children
    start          ranks meet, find that they will serve the same, and reach one another
    lead           rank 0: opens the doors, loads, decides
    follow         the others: load, and run what rank 0 orders until it ends the run
    load_progress  progress of loading, through which it is interrupted
    failure        what the loss of a rank leads to
"""
