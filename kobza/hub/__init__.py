"""Where text and weights come from: pinned packages, checksums, a cache. Nothing here is imported by the core."""
