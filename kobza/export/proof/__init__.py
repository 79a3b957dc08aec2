"""The certificate: an exported model opened by another engine and held against the one that was trained."""
