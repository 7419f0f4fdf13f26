"""Integration with torch: torch.compile, torch.func, DDP, state dicts, pickling."""
