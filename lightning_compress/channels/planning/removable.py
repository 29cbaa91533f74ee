"""Says which of the groups that a model has may be cut, and why the others stay."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_compress.channels.planning.recipe import Recipe
from lightning_compress.channels.tracing.blocks import find_blocks
from lightning_compress.channels.tracing.groups import DependencyGroups, Group
from lightning_compress.channels.tracing.verify import Subject
from lightning_compress.errors import CompressionError, invalid
from lightning_compress.messages import by_reason, named
from lightning_compress.modules.paths import named_tensors
from lightning_compress.targets import Targets, matches


def removable(subject: Subject, groups: DependencyGroups, recipe: Recipe) -> tuple[DependencyGroups, dict[str, str]]:
    """Only the groups that may lose channels, and the blocks that may leave if they are to, and why others stay.

    Raises:
        CompressionError: a pattern matches nothing, or nothing can be removed.
    """
    model = subject.model
    recipe.targets.check_patterns(model)
    if recipe.blocks and (groups.all or recipe.budget.kind != "channels"):
        groups = find_blocks(subject, groups)
    layers = [layer for group in groups.all for layer in group.layers if not group.skip]
    for pattern in recipe.overrides:
        if not any(matches(layer, pattern) for layer in layers):
            raise invalid("overrides", "match layers that can lose channels", pattern, f"These are {layers[:8]}.")
    tensors = named_tensors(model)
    refusals = [_refusal(group, recipe.targets, tensors) for group in groups.all]
    refused = {group.name: reason for group, reason in zip(groups.all, refusals, strict=True) if reason}
    groups = groups.only([number for number, reason in enumerate(refusals) if not reason])
    fixed = {**groups.fixed, **refused}
    require_groups(model, groups, fixed)
    return groups, fixed


def require_groups(model: nn.Module, groups: DependencyGroups, fixed: Mapping[str, str]) -> None:
    """Raise if nothing can be removed."""
    if not groups.all:
        reasons = "; ".join(f"{named(layers)}: {reason}" for reason, layers in list(by_reason(fixed).items())[:6])
        raise CompressionError(
            f"`model` must have channels that can be removed. Received: {type(model).__name__}, where everything stays "
            f"whole: {reasons or 'no layer was called'}."
        )


def _refusal(group: Group, targets: Targets, tensors: Mapping[str, Tensor]) -> str:
    for layer in (*group.layers, *(member.layer for member in group.members if group.skip)):
        if reason := targets.leaves_out(layer):
            return reason
    makers = [tensors[member.name] for member in group.members if member.makes or group.skip]
    if any(isinstance(tensor, nn.Parameter) and tensor.dim() > 1 and not tensor.requires_grad for tensor in makers):
        return "frozen"
    owners = {member.name.rpartition(".")[0] for member in group.members}
    if group.spanned and not owners & set(targets.include or ()):
        return f"{group.spanned}; name a layer of it exactly in targets.include to cut it all the same, approximately"
    return ""
