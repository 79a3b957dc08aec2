"""Injected bugs and clean controls, a file an area: the proof that each check sees what it says it sees, and nothing else."""
