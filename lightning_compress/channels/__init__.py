"""Removes channels: finds which depend on each other, chooses those that matter least, and cuts them out."""

from lightning_compress.channels.planning.plan import PlanRow, RemovalPlan
from lightning_compress.channels.remove_channels import plan_removal, remove_channels_

__all__ = ["PlanRow", "RemovalPlan", "plan_removal", "remove_channels_"]
