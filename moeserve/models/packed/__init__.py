"""A model folder whose weights lie as the kernels want them: start-up is a map.

::

    layout                     ``packed.json``: what lies where; every read checked
    leaves                     the tensors and matrices of a part, by name, and put in again
    skeleton                   a decoder's parts without data, as the config implies them
    mapping                    a file as memory that cannot be written
    writer                     a packed copy of a model folder, one layer at a time
    checkpoint                 a packed folder as the loader takes a model folder
    model                      an open packed folder: its regions, and parts over any memory
    cli                        ``moeserve quantize --packed``
    decoder                    the decoder over the mapped files
"""
