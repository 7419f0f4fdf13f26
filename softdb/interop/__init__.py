"""softdb in the machinery of others: torch.compile and torch.export."""
