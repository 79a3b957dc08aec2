"""`kobza doctor gguf X.gguf [--hf DIR]`: is the file what its readers take it for, and is it the model that it was made from?

The checks are in gguf_header.py (tokens and chats), gguf_pre.py (pre-tokenizer) and gguf_weights.py (settings and tensors).
"""

from __future__ import annotations

from kobza.doctor.files.gguf_header import TOKEN_CHECKS, GgufSubject, open_
from kobza.doctor.files.gguf_pre import PRE_CHECKS
from kobza.doctor.files.gguf_weights import WEIGHT_CHECKS, facts

CHECKS = TOKEN_CHECKS + PRE_CHECKS + WEIGHT_CHECKS
__all__ = ["CHECKS", "GgufSubject", "facts", "open_"]
