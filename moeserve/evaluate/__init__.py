"""How far a model's answers lie from those of a reference run of it.

::

    cli  report  picture       ``moeserve evaluate``; its report; the report drawn
    compare                    two runs of a model over the same texts and problems
    texts  arithmetic          what is scored: windows of text; sums with exact answers
    divergence                 perplexity, KL divergence, agreement, with their errors
    answers  routing           what a run writes; the experts that it routes to
"""
