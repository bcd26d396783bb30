"""Requests to tokens, on one rank or several.

::

    scheduler.py      which tokens run in the next step (sequence: a request under way;
                      step_builder: the step under construction; blocks: who holds which KV block)
    executor.py       what runs a step: the seam between decisions and tensors
    model_runner.py   runs it on this process's decoder; null: without a model, to check schedulers
    drive.py          plan, run, apply: one step after the other
    loop.py           the engine: a thread that makes steps and feeds streams (request_state: what
                      it keeps of a request; text: from token ids to text)
    rank_model.py     one rank's share of a model, loaded (kv_size: how many KV blocks it gets);
                      build: from a folder to an engine
    ranks/            one queue and one step over several ranks
    replan/           another placement of experts while serving
"""
