"""Checks of training: the data, one's own step function, a run's curves and inside, the black box of a bad step."""
