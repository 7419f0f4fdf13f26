"""Shared test code: read contract, reference implementation, fault injection, subprocesses."""
