"""Child processes: ``child`` starts, watches and ends them, ``ask`` and ``answer`` are the two
sides of a conversation in lines of JSON. The standard library only."""
