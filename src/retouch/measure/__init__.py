"""Proof: edit traces, and load."""
