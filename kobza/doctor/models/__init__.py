"""Checks of a model in memory: the battery of laws, and parity of two models, layer by layer."""
