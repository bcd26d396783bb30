"""What is watched while serving.

::

    metrics                    counters and distributions as Prometheus reads them
    routing                    which experts each token chose, recorded into a file
    progress                   what a rank is doing: for ranks that wait for it, and for timelines
    timeline                   what a rank did when, as a trace that Perfetto opens
"""
