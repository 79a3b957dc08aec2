"""The serving engine: many texts at once over one model, each with the bits it would have alone.

runner.py          a forward of a ragged batch: attention.py the paged cache, blocks.py the model on rows, lora.py adapters
engine.py          what runs when: request.py, row.py, pool.py, sampling.py, speculative.py; selftest.py proves it on itself
text.py chat.py    ids <-> text as it comes, messages and tools; constraint.py what a grammar allows
http/              the OpenAI and Ollama faces
"""
