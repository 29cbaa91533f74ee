"""Numerics: numbers to codes of a few bits and back, and what a scheme is. No layers, no models."""
