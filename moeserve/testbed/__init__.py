"""Several hosts on one machine: namespaces on a switch, joined by links of a chosen rate.

``network`` raises and removes them (``links``, ``marks``), ``ranks`` runs a command on them as a
launcher would, ``cli`` is ``moeserve testbed``. Knows nothing of tensors or models.
"""
