"""From a checkpoint folder to logits: reader, one decoder, and a short file per family."""
