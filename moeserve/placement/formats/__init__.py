"""Files of others: recorded routing, ``torch.save``, plans of other runtimes."""
