"""Other people's files: tensors, metadata, names and chat templates as the ecosystem ships them, read without trusting them."""
