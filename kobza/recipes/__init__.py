"""Recipes: one file a verb, flat, top to bottom; the only place where rooms meet."""
