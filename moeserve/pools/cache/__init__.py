"""The cache pool: KV of prefixes that any peer has computed, kept by members of the role ``CACHE``.

* ``keys``: what a page is called, whose it is, and which pages lie together
* ``ring``: which members keep what, by consistent hashing
* ``ledger``: what a tier holds: bytes, quotas, pins, and what goes first
* ``pages``: a page as bytes, and the runs of KV in it
* ``memory``: pages in memory
* ``page_files``: a folder of pages on a disk, each whole or absent
* ``disk``: pages on the disk, off the event loop
* ``store``: memory and disk as one
* ``messages``: what is said over the wire, read with suspicion
* ``service``: a store as others reach it
* ``cache_members``: the members that one knows, who owns a key, and who rests after a failure
* ``calls``: calls to one member
* ``puts``: what was computed, on its way into the pool
* ``pool``: the pool as a peer uses it
* ``page_kv``: pages out of a rank's blocks, and into them
* ``pooled_house``: a rank's KV with the pool behind it: looks there before it computes, puts after
* ``prefix_arrival``: a request that waits for the pool; sinks that tell of first tokens
* ``recompute``: whether fetching is cheaper than computing, from measured rates
"""
