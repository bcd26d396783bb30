"""The cache pool: KV of prefixes that any peer has computed, kept by members of the role ``CACHE``.

* ``keys``: what a page is called, whose it is, and which pages lie together
* ``ring``: which members keep what, by consistent hashing
* ``ledger``: what a tier holds: bytes, quotas, pins, and what goes first
* ``recompute``: whether fetching is cheaper than computing, from measured rates
"""
