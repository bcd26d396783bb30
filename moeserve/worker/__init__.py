"""Processes of a run: one rank of several, under any launcher that ``comm.launch`` reads or
launched by ``moeserve serve --ep N``; a member of a cluster, a gateway, and a cluster on one host.

    command        the command line of a rank: one of several, or alone
    local          serve --ep N: rank 0 here, the others as children
    start          ranks meet, find that they will serve the same, and reach one another
    rank           meet, load, serve, and leave together with the others
    load_progress  progress of loading, through which it is interrupted
    cluster_command  the commands peer, gateway and up, once their settings are read
    peer           moeserve peer: a member of a cluster
    member         a rank with a model as a member: requests of gateways, KV that comes and goes
    cache_member   a member that keeps KV of others, and runs no model
    weights        a member's weights from other members, before it loads, and for them
    place_in_cluster  the server by which others reach a process, and its lease
    gateway        moeserve gateway: the doors of a cluster, without weights
    cluster_trust  how processes of a cluster trust one another, and where each is reached
    up             moeserve up: a whole cluster on this host
    restarts       when a part of it that has ended is started anew
    cluster_cli    the words of these commands
    failure        what the loss of a rank leads to, and how a process leaves after a failure
"""
