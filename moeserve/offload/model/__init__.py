"""The performance model: from what a machine can do and what a model asks for to seconds. Pure.

``machine``: what was measured; ``overheads``, what of it layers do beside kernels; ``demand``: what
a model needs; ``distinct``: how many experts a step touches; ``locality``: how many of them are
there, where those that requests prefer are kept; ``residency``: what of a model is in memory.
``bound`` is stage 1, what capacities and bandwidths allow. Stage 2: ``predict``, a step;
``overlap``, what of it computes and reads at once;
``schedule``, requests that come at once, step by step; ``steady``, many more requests in closed
form; ``workload``, what both are asked about. ``halving`` finds where something changes.
docs/performance_model.md has the equations, with their sources.
"""
