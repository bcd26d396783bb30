"""How far a model's answers lie from those of a reference run of it: perplexity, KL, agreement."""
