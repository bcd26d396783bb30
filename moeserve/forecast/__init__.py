"""What a host would make of a model, said beforehand: measure the host, predict the model.

``shapes``: the sizes that kernels are measured at. ``kernels``: what products and attention cost
here. ``timing``: one call timed.
``disk``: how fast a file is read. ``steps``: what a step costs beside these. ``calibrate``:
all of them, as a ``MachineModel`` that is kept.
"""
