"""Pools of peers: instances that prefill, decode or keep KV, and serve one another over gRPC.

* ``cache/``: the pool of KV pages: who keeps what, in memory and on disk, and how it is asked
* ``kv/``: KV between caches: its bytes on the way, digests, who fetches it from where
* ``registry/``: leases of members, kept by gateways or elsewhere, and the view one has of them
* ``routing/``: which members a request goes to, from the load that they report
* ``weights/``: checkpoints from members that have them, chunk by chunk
* ``cluster``: the members as one engine, which the doors of a gateway submit to
* ``cluster_links``: who is there, a route for each request, and links, as a gateway needs them
* ``cluster_requests``: a request on its way through members, and members that failed lately
* ``compute_id``: which members compute the same bits
* ``metrics``: what members report, as a page of metrics has it
* ``rebalancing``: running requests of a gateway off members that are crowded
* ``members``: who takes part, what it serves, and the load that it reports
"""
