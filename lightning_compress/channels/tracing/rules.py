"""Says what each operator does with channels: one rule for each family of operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_compress.channels.tracing import product_rules, shape_rules
from lightning_compress.channels.tracing.tracer import Rule, Tracer, given, leaves, name_of, spread, unknown, varying

# Element by element, though torch doesn't tag them so.
_POINTWISE = {"hardswish", "log_sigmoid_forward", "where", "rsub", "native_dropout", "bernoulli", "_to_copy", "copy",
              "_prelu_kernel", "rrelu_with_noise", "masked_fill"}  # fmt: skip
_LIKE = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
_KEEP = {"zero", "fill", "normal", "uniform", "bernoulli", "set"}
_CHECKS = {"_is_all_true", "_is_any_true", "_assert_async"}
_MOVES = {"permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "select", "slice", "split", "unbind",
          "split_with_sizes", "flip", "roll", "repeat", "detach", "alias", "lift_fresh", "clone", "diagonal",
          *shape_rules.VIEWS}  # fmt: skip
_REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "prod",
               "norm", "linalg_vector_norm", "logsumexp", "any", "all"}  # fmt: skip
_SOFTMAX = {"_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp"}
_ORDERED = {"amax", "amin", "max", "min", "prod", "any", "all"}
_COUNTING = {"mean", "var", "std", "var_mean"}
_SPATIAL = ("max_pool", "avg_pool", "_adaptive_avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample",
            "_upsample", "reflection_pad", "replication_pad", "grid_sampler", "fractional_max_pool")  # fmt: skip
_BATCHNORM = ("native_batch_norm", "_native_batch_norm", "_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")


def rule_for(func: Any) -> Rule:
    """Return the rule of an operator; an unknown one lets all its channels stay."""
    if func.namespace != "aten":
        return unknown
    name, overload = name_of(func), func._schema.overload_name
    base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    if name != base and base in _KEEP:
        return nothing
    if base in _RULES:
        return _RULES[base]
    if base in _MOVES and not (base == "squeeze" and overload == "dims"):
        return shape_rules.move
    if base in _REDUCTIONS:
        return pointwise if overload == "other" else reduce
    if base.startswith(_BATCHNORM):
        return batch_norm
    if base.startswith(_SPATIAL):
        return spatial
    return pointwise if torch.Tag.pointwise in func.tags else unknown


def nothing(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """The values change, the channels don't."""


def like(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """A new tensor of another's shape has as many channels."""
    tracer.set(out, tracer.labels(args[0]))


def pointwise(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Element by element: channels that meet are one."""
    tensors = leaves((args, kwargs))
    rank = max(tensor.dim() for tensor in tensors)
    # An operator in place keeps its tensor's shape; the others broadcast, aligned at their last dimensions.
    factors = tracer.meet([tracer.operand(tensor, rank) for tensor in tensors])
    for leaf in leaves(out):
        tracer.set(leaf, factors if leaf.dim() == rank else ())


def spatial(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Pooling, padding, interpolation: channel by channel."""
    x = args[0]
    name = func._schema.name
    places = next((count for count in (1, 2, 3) if f"{count}d" in name), None)
    if places is None or any(isinstance(leaf, Tensor) for leaf in args[1:] if "grid" not in name):
        return unknown(tracer, func, args, kwargs, out)
    factors = []
    for factor in tracer.labels(x):
        for dim in range(x.dim() - places, x.dim()):
            tracer.sets.union(factor, factor.narrow(dim, 0, 1))
            factor = factor.narrow(dim, 0, 1)
        factors.append(factor)
    tracer.set(out, tuple(factors))


def pad(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Padded places are fixed."""
    x, sizes = args[0], args[1]
    padded = {x.dim() - 1 - place // 2 for place, size in enumerate(sizes) if size}
    factors = []
    for factor in tracer.labels(x):
        if padded & set(varying(factor)):
            factor = torch.constant_pad_nd(factor.expand(x.shape), sizes, 0)
        factors.append(factor)
    tracer.set(out, tuple(factors))


def reduce(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """A width that is reduced ends; what goes from it changes the outcome."""
    x, named = args[0], given(func, args, kwargs)
    dims, keep = named.get("dim"), bool(named.get("keepdim", False))
    dims = list(range(x.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    gone = {dim % x.dim() for dim in dims} if x.dim() else set()
    name = name_of(func)
    factors = []
    for factor in tracer.labels(x):
        if gone & set(varying(factor)):
            lasting = name in _ORDERED or (name in _COUNTING and tracer.sets.in_weights)
            tracer.sets.span(factor, f"`{name}` runs over it, in {tracer.where()}", lasting)
            if set(varying(factor)) - gone:
                tracer.sets.freeze(factor, f"`{name}` runs over a part of it, in {tracer.where()}")
            continue
        factors.append(factor if keep else factor.squeeze(tuple(gone)))
    tracer.set(out, tuple(factors))


def softmax(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """As a reduction, but the width goes on."""
    x = args[0]
    dim = args[1] if len(args) > 1 and isinstance(args[1], int) else kwargs.get("dim", -1)
    name = name_of(func).strip("_")
    for factor in tracer.labels(x):
        if x.dim() and factor.shape[dim] > 1:
            tracer.sets.span(factor, f"`{name}` runs over it, in {tracer.where()}")
    tracer.set(out, tracer.labels(x))


def batch_norm(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Channel by channel."""
    x = args[0]
    others = [tensor for tensor in args[1:5] if isinstance(tensor, Tensor)]
    across = [factor for factor in tracer.labels(x) if factor.shape[1] == 1]
    for factor in across:  # a weight that is standardized so
        tracer.sets.span(factor, f"a norm spans it, in {tracer.where()}", lasting=tracer.sets.in_weights)
    labels = tracer.same((x, 1), *((tensor, 0) for tensor in others))
    if labels is not None:
        tracer.note_size(x.shape[1], labels)
    tracer.set(out[0], (*across, *spread(labels, 1, x.dim())))


def layer_norm(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Each channel's value depends on all."""
    x, shape, *affine = args[:4]
    out = out[0] if isinstance(out, tuple) else out
    if len(shape) > 1 or not isinstance(affine[0], Tensor):
        tracer.freeze(x, f"a norm over several dimensions, or without weights of its own, in {tracer.where()}")
        return None
    others = [tensor for tensor in affine if isinstance(tensor, Tensor)]
    across = [factor for factor in tracer.labels(x) if factor.shape[-1] == 1]
    labels = tracer.same((x, -1), *((tensor, 0) for tensor in others))
    if labels is not None:
        tracer.sets.span(labels, f"a norm spans it, in {tracer.where()}", lasting=True)
    tracer.set(out, (*across, *spread(labels, -1, x.dim())))


def group_norm(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Each channel's value depends on all of its group; groups stay as long as each other."""
    x, weight, bias, groups = args[0], args[1], args[2], args[6]
    others = [tensor for tensor in (weight, bias) if tensor is not None]
    labels = tracer.same((x, 1), *((tensor, 0) for tensor in others))
    if labels is None:
        return
    if groups == x.shape[1]:
        tracer.sets.freeze(labels, f"as many groups as channels, in {tracer.where()}")
    tracer.sets.span(labels, f"a norm spans it, in {tracer.where()}", lasting=True)
    tracer.note_size(x.shape[1], labels)
    blocks = labels.view(groups, -1)
    tracer.sets.union(blocks, blocks[:1])
    tracer.set(out[0], spread(labels, 1, x.dim()))


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_CHECKS, nothing),
    **dict.fromkeys(_LIKE, like),
    **dict.fromkeys(_SOFTMAX, softmax),
    **dict.fromkeys(_POINTWISE, pointwise),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), product_rules.product),
    "_grouped_mm": product_rules.grouped_product,
    **dict.fromkeys(("convolution", "_convolution"), product_rules.convolution),
    **dict.fromkeys(("cat", "stack"), shape_rules.cat),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), layer_norm),
    "native_group_norm": group_norm,
    **dict.fromkeys(("index", "index_select"), shape_rules.index),
    **dict.fromkeys(("index_add", "index_copy", "scatter_add", "scatter_reduce", "scatter"), shape_rules.scatter),
    **dict.fromkeys(("_pack_padded_sequence", "_pad_packed_sequence"), shape_rules.sequence),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), shape_rules.shuffle),
    "constant_pad_nd": pad,
    "glu": shape_rules.glu,
    **dict.fromkeys(("as_strided", "unfold"), shape_rules.strided),
    **dict.fromkeys(("embedding", "_embedding_bag"), product_rules.embedding),
    **{
        f"_scaled_dot_product_{kernel}": product_rules.attention
        for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    },
    "_weight_norm_interface": product_rules.weight_norm,
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), shape_rules.pixel_shuffle),
}
