"""What is watched while serving.

::

    metrics                    counters and distributions as Prometheus reads them
    families                   how they are written: our names, and vLLM's beside them
    choices                    why steps had their shape, counted
    counted                    what parts of the program count, each field a metric
    requests                   one record for each client's request, and its line in the log
    spans                      spans of requests, as OpenTelemetry has them
    logs                       the log of a process, as text or as JSON
    log_bound                  how many lines the same thing may write
    loading                    how far a model is loaded: a bar, or lines in the log
    expert_counts              how often each expert was chosen
    routing                    which experts each token chose, recorded into a file
    progress                   what a rank is doing: for ranks that wait for it, and for timelines
    timeline                   what a rank did when, as a trace that Perfetto opens
"""
