"""What a model knows, copies and can do: losses on any text, measures of what it writes, memorisation, tasks, a harness."""
