"""From queries and keys to scores, and from scores to weights."""
