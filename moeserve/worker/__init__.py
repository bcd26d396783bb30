"""One rank of several: ``python -m moeserve.worker`` with the settings of ``moeserve serve``, under
any launcher that ``comm.launch`` reads; and ``moeserve serve --ep N``, which launches its own.

Rank 0 opens the doors and decides (``lead``); the others do what it orders until it ends the run
(``follow``). Both ``start`` alike: they meet, and agree on what they will serve. What happens when
a rank is lost is decided in one place (``failure``).
"""
