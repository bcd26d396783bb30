"""What runs in processes of its own while ``moeserve bench`` measures; ``answer`` is how."""
