"""A model in other people's files: the Hugging Face layout, GGUF, Ollama, adapters; and the proof that it is the same model."""
