"""GGUF files (llama.cpp's format) of the families we serve, read as if they were model folders.

::

    places      whether a path leads to such a file, and which files make one model
    header      what a file says of itself: metadata and where tensors lie, every size bounded
    block_types the types of tensors: how many values and bytes a block has
    blocks      blocks to the matrices of the op table, exact where a format of ours holds them
    metadata    typed reads of what a file says
    config      metadata to what ``config.json`` would say
    names       tensors under the names that a folder would give them
    arrange     tensors that a converter has split or turned, put together again
    entries     all of that as a checkpoint takes it
    tokenizer   metadata to what ``tokenizer.json`` would say
    splitting   how a text is cut before merges, by the name that a file has for it

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""
