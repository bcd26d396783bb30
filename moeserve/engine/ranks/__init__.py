"""Requests over several ranks: homes, the leader and its followers, what they say to each other."""
