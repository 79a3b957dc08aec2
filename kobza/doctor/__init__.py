"""Finds what is wrong with a model or a run. So far: the black box of a step that met an inf or nan."""
