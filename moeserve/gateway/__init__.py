"""Peers that serve each other; here the doors through which clients come in."""
