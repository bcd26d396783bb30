"""Answers in a given form: which tokens may come next, from a process that can be killed.

Grammars are strangers' programs, and llguidance compiles and runs them: in a child process, inside
limits of processor time and memory. A mask is a function of grammar and tokens so far and of
nothing else, so a new process that is given the tokens again goes on where another was killed.

::

    json_options  how JSON is written in answers
    compiling   a ``core.Grammar`` to llguidance's matcher, within its limits
    layout      what lies where in the memory that both sides share
    child       the process: matchers of the requests under way, masks into shared memory
    worker      the parent's side of it: start, ask, wait, end
    masks       what a model runner has: the masks of a step, computed while its model runs
    checking    what a door has: whether a grammar can be compiled
"""
