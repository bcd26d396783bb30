"""Another plan while serving.

::

    routing_counts             what a rank counts of its own tokens' routing
    replanner  benefit         proposes plans of itself; whether a new plan pays
    live  coordinator          plans on rank 0: read again or proposed; put into steps
    switch  swapper            which layer changes when; a rank's part in a change
"""
