"""KV between caches: what a cache offers, how its bytes travel, and whether they arrived whole.

* ``house``: the KV of one rank, as those see it who bring some or take some away
"""
