"""Kernels for GPUs, in Triton: each with formula and derivative, its plain twin named, and tested in Triton's interpreter.

Nothing outside this package imports Triton; `kobza.kernels.choose` says what of it serves a model here and puts that in place."""
