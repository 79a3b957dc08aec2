"""Tokens under a magnifying glass: how tokenizers cut a text, which suits it, and writing in one alphabet only."""
