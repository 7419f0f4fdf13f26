"""The table of rows: what lies where, what changed, and who may look."""
