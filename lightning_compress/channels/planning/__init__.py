"""Chooses the channels that leave, so that a budget is met."""
