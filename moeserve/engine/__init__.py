"""Requests to tokens, on one rank or several.

::

    scheduler.py      which tokens run in the next step (bounds: what it takes and refuses;
                      policies/: whom it asks; step_cost: what steps cost;
                      sequence: a request under way; step_builder: the step under construction;
                      acceptance: what a step that is over means for its requests;
                      foresight: the step after it; blocks: who holds which KV block; kv_manager:
                      which of them a request has; preemption: who gives up its blocks; swapping,
                      swap_space, swap_memory: their KV in host memory meanwhile; waiting,
                      deadlines: who is next, who is late)
    executor.py       what runs a step: the seam between decisions and tensors
    model_runner.py   runs it on this process's decoder (input_batch: what it keeps from step to
                      step; mtp_drafts: guesses of the model's own module, draft_model: of a smaller
                      model, draft_loading: which of them; layer_states: of prompts that run in one
                      group of layers a step); null: without a model, to check schedulers
    drive.py          plan, run, apply: one step after the other
    ahead.py          the next step planned and started while one runs (threaded: an executor that
                      can be started, as a device can)
    loop.py           the engine: a thread that makes steps and feeds streams (request_state: what
                      it keeps of a request, and how its events leave; pace: when a step is due;
                      observers: several who watch it)
    kv_exchange.py    the KV of a rank for those who bring some or take some away (kv_tensors: as
                      bytes; step_progress: layer by layer; rates: how fast the rank computes)
    rank_model.py     one rank's share of a model, loaded (rank_weights: where its weights lie;
                      kv_size: how many KV blocks it gets; device_memory: what an accelerator has
                      room for; device_streaming: whether experts are streamed to it); build: from a
                      folder to an engine
    semi/             prompts in a process of their own, over the same weights and KV
    ranks/            several ranks: where requests run, and steps in common
    replan/           another placement of experts while serving
"""
