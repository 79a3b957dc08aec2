"""Checks of files alone: config, tokenizer, template, GGUF, adapter. No torch, nothing executed."""
