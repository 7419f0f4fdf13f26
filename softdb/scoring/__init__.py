"""Scoring: metrics give scores of keys, normalizers give weights of scores."""
