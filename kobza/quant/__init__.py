"""Weights in few bits, by surgery on a built model; each form with its plain twin."""
