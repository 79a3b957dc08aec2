"""The explorer: a language model taken apart, a lesson a page, each with an address of its own."""
