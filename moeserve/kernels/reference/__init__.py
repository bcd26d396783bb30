"""The op table in plain torch: slow, obvious, and the oracle of every other backend (law 7)."""
