"""The op table in plain torch: slow, obvious, and the oracle of every other backend (law 7).

ops        the table itself: norms, linear layers, routing, experts
products   a product with every kind of weight
combine    exact sums of contributions
kv         the paged cache, attention as an online softmax, blocks as bytes
wire       dispatch and combine, record by record
sampling   from logits to a token
"""
