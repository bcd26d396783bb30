"""Who this process is among the ranks, how ranks meet, and how to start some as children."""
