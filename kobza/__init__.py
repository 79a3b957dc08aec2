"""kobza trains, tunes, checks, ships and serves language models from scratch, on the machine people have."""

__version__ = "0.1.0"
