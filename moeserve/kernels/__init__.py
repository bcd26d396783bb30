"""The op table and its backends.

ops         the contract: every tensor operation a decoder may use, and its data
matrix      weights in 8 and 4 bits, and how floats become them
wire        records and sums that ranks send each other; the exact combine
kv_layout   KV blocks as bytes, outside of any cache
sampling    what sampling takes for every row of logits, and what it gives back
host_copy   the one way from a tensor to an array in host memory
fused       the parts of a layer spelled out in primitive operations
reference   the backend in plain torch: the oracle
cpu         the native backend
select      which backend serves a device
probe       how fast the machine can go at most
"""
