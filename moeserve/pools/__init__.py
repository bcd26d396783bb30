"""Pools of peers: instances that prefill, decode or keep KV, and serve one another over gRPC.

* ``kv/``: KV between caches: its bytes on the way, digests, who fetches it from where
* ``metrics``: what members report, as a page of metrics has it
* ``members``: who takes part, what it serves, and the load that it reports
"""
