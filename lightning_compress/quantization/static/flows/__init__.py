"""Flows: how static int8 gets into a traced module; one for each upstream that could go away."""
