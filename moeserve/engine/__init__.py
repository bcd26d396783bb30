"""Requests to tokens.

::

    scheduler  step_builder    which tokens run in the next step; how a step is put together
    sequence  blocks           a request while it runs; who holds which KV block
    executor  drive            what runs a planned step; plan, run, apply, in one way
    model_runner  null         executors: on a decoder, which owns the KV tensors; without a model
    loop  request_state  text  the thread that owns both; what it keeps of a request; ids to text
    rank_model  kv_size        a rank's share of a model; how many KV blocks it has
    build                      from a model folder to a running engine
    ranks/                     requests over several ranks
    replan/                    another plan while serving
"""
