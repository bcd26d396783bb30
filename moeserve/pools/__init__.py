"""Pools of peers: instances that prefill, decode or keep KV, and serve one another over gRPC.

* ``kv/``: KV between caches: its bytes on the way, digests, who fetches it from where
* ``registry/``: leases of members, kept by gateways or elsewhere, and the view one has of them
* ``routing/``: which members a request goes to, from the load that they report
* ``members``: who takes part, what it serves, and the load that it reports
"""
