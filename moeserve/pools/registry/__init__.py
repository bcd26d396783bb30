"""Who is there: members hold leases in a registry, and whoever needs them follows it into a view.

* ``base``: what a registry does; leases, heartbeats, and what a watcher is told
* ``leases``: the members of a registry and when their leases end: a table without a clock
* ``memory``: a registry in this process, which a gateway has
* ``embedded``: that registry as others reach it, over gRPC
* ``remote``: a registry in another process, over gRPC
* ``etcd``: a registry in etcd
* ``etcd_server``: the command that starts an etcd
* ``several``: several of them taken as one, so that none of them is needed
* ``connect``: the registry that a list of addresses names
* ``heartbeat``: keeps a member in a registry, with its newest load
* ``view``: the members that one knows; stays while registries are away
* ``follow``: brings what registries tell into a view
"""
