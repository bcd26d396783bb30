"""Weights from members that have them, before or instead of the disk.

* ``counts``: what came from where, and what was wrong with it
* ``fetch``: chunks from several members at once into files, each checked
* ``folders``: where they lie on this host: whole or absent, shared, removed when unused
* ``manifest``: what a checkpoint consists of, and what its chunks are called
* ``offers``: a member that has a checkpoint, as others ask it
* ``rates``: how fast a folder is read here, and where weights are best taken from
* ``search``: which members have which checkpoint
* ``stored``: a checkpoint put into the cache pool, chunk by chunk
"""
