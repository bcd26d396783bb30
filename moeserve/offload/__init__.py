"""Hosts whose fast memory is smaller than the model.

``model``: the performance model, pure: what a machine and a model allow, and what binds.
``checkpoint_demand``: what the model in a folder asks of a machine, from headers alone.
``calibrations``: where measurements of this host are kept.
"""
