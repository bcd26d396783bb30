"""The performance model: from what a machine can do and what a model asks for to seconds. Pure.

``step_cost``: what a scheduler asks of it.
"""
