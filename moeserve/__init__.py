"""moeserve: serve Mixture-of-Experts language models.

Imports run one way, and ``tests/test_layout.py`` holds it::

    core  errors  config  pb  host  native  process  regular_file  safetensors_header   plain data
      ^
    kernels  placement                        op table; who holds which expert
      ^
    models  observe  grammar                  checkpoint to decoder; counters; which tokens may come
      ^
    comm                                      moving tokens; layers over ranks
      ^
    engine  offload                           requests to tokens
      ^
    pools                                     peers: who is there, KV between them, which has what
      ^
    gateway  doctor  forecast  evaluate  bench  testbed   doors; this host; accuracy; speed; hosts
      ^
    worker                                    one rank of several
      ^
    cli  __main__
"""

__version__ = "0.1.0"
