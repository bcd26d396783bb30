"""Hosts whose fast memory is smaller than the model.

``model``: the performance model, pure: what a machine and a model allow, and what binds.
"""
