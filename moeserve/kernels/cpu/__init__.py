"""The op table by native kernels (``kernels/cpu/`` at the root): shapes are checked here."""
