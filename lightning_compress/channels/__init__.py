"""Channel removal: what hangs together, what matters least, and taking it out."""

from lightning_compress.channels.plan import PlanRow, RemovalPlan, plan_removal, remove_channels_

__all__ = ["PlanRow", "RemovalPlan", "plan_removal", "remove_channels_"]
