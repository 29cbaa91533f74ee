"""Adapters of low rank over 4-bit weights."""
