"""How bytes travel between ranks: one interface (``base``), a backend a module. Knows no tokens."""
