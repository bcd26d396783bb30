"""From a checkpoint folder to logits.

::

    library  hub               where a model's name leads: the demo, a folder, or the hub's cache
    checkpoint  fields  files  ``config.json`` and memory-mapped safetensors, every read checked
    fingerprint  survey        is it the same checkpoint; what serving it would take
    npu_fallbacks              what of it the operators of Ascend NPUs do not take
    spec  names                what a model is, and what its tensors are called: plain data
    families/                  ``config.json`` to a spec: a short file per architecture
    formats/                   stored codes to the matrices of the op table
    gguf/                      llama.cpp's files, as if they were folders
    weights  expert_source     tensors as the op table takes them; experts read again while serving
    unread                     tensors that nobody read, and why they need not be
    packed/                    folders whose weights lie as the kernels want them: mapped
    decoder                    the one decoder: token ids in, logits out
    layer_runner               who runs its layers: this process; others are in ``comm``
    group_routing              what rows chose that run in one group of layers a step
    attention  moe  rope       its parts: attention, feed-forward, rotary tables
    batch                      one forward pass as tensors
    tokenizer  chat_template   text to token ids and back; chat messages to a prompt
    tokenizer_parts            what both are made of, in a folder or a GGUF file
    tokenizer_cost             what a tokenizer may take, as far as its parts tell
    text_worker                both in a process that may be ended
    checked_tokenizer          one that such a process has loaded before
    generation_tag             a tag of chat templates that transformers adds to Jinja
    quantize  shards           a quantised copy of a folder; safetensors written piece by piece
"""
