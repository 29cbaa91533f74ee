"""Channel removal: what hangs together, what matters least, and taking it out."""

from lightning_compress.channels.plan import plan_removal, remove_channels_
from lightning_compress.channels.removal_plan import PlanRow, RemovalPlan

__all__ = ["PlanRow", "RemovalPlan", "plan_removal", "remove_channels_"]
