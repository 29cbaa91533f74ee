"""Flows: how a scheme gets into a model; one file for each upstream that could go away."""
