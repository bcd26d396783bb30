"""From a model's text to content, reasoning and tool calls, as it comes.

Pure and incremental: text in, parts out, no transport. How a text is cut into pieces changes
nothing of what its parts join to. Nothing raises: what is no call in the model's format is content.

::

    parts         what comes out: content, reasoning, a call's beginning, its arguments
    machine       a text that is read with one state at a time, and its markers
    json_calls    calls whose arguments are JSON: Hermes and Qwen, DeepSeek, Kimi-K2
    tagged_calls  calls whose arguments are tags: GLM, Qwen3-Coder
    thinking      reasoning between ``<think>`` and ``</think>``
    harmony       the channels of gpt-oss
    styles        which of them a model needs, from its chat template
    answer        everything that came of one sequence
    answer_grammar  calls that are asked for, and a budget of reasoning, as a grammar
"""
