"""What each operator does with channels: one rule for each family of operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_compress.channels.tracer import Factors, Size, Tracer, compressed, spread, varying

Rule = Callable[[Tracer, Any, Any, dict[str, Any], Any], None]

# Element by element, though torch doesn't tag them so.
_POINTWISE = {"hardswish", "log_sigmoid_forward", "where", "rsub", "native_dropout", "bernoulli", "_to_copy", "copy",
              "_prelu_kernel", "rrelu_with_noise", "masked_fill"}  # fmt: skip
_LIKE = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
_KEEP = {"zero", "fill", "normal", "uniform", "bernoulli", "set"}
_CHECKS = {"_is_all_true", "_is_any_true", "_assert_async"}
_VIEWS = {"view", "_unsafe_view", "_reshape_alias"}
_MOVES = {"permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "select", "slice", "split", "unbind",
          "split_with_sizes", "flip", "roll", "repeat", "detach", "alias", "lift_fresh", "clone", "diagonal",
          *_VIEWS}  # fmt: skip
_REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "prod",
               "norm", "linalg_vector_norm", "logsumexp", "any", "all"}  # fmt: skip
_SOFTMAX = {"_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp"}
_ORDERED = {"amax", "amin", "max", "min", "prod", "any", "all"}
_SPATIAL = ("max_pool", "avg_pool", "_adaptive_avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample",
            "_upsample", "reflection_pad", "replication_pad", "grid_sampler", "fractional_max_pool")  # fmt: skip
_BATCHNORM = ("native_batch_norm", "_native_batch_norm", "_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")


def rule_for(func: Any) -> Rule:
    """The rule of an operator; one that isn't known lets all its channels stay."""
    if func.namespace != "aten":
        return unknown
    name = func._schema.name.rpartition("::")[2]
    overload = func._schema.overload_name
    base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    if name != base and base in _KEEP:
        return nothing
    if base in _RULES:
        return _RULES[base]
    if base in _CHECKS:
        return nothing
    if base in _LIKE:
        return like
    if base in _MOVES and not (base == "squeeze" and overload == "dims"):
        return move
    if base in _REDUCTIONS:
        return pointwise if overload == "other" else reduce
    if base in _SOFTMAX:
        return softmax
    if base.startswith(_BATCHNORM):
        return batch_norm
    if base.startswith(_SPATIAL):
        return spatial
    if torch.Tag.pointwise in func.tags or base in _POINTWISE:
        return pointwise
    return unknown


def unknown(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Whatever an operator that isn't known gets must stay as it is."""
    tracer.pin((args, kwargs), f"`{func._schema.name.rpartition('::')[2]}` in {tracer.where()} isn't understood")
    for leaf in pytree.tree_leaves(out):
        tracer.set(leaf, ())


def nothing(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """The values change, the channels don't."""


def like(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """A new tensor of another's shape has as many channels."""
    tracer.set(out, tracer.labels(args[0]))


def pointwise(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Element by element: channels that meet are one."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    rank = max(tensor.dim() for tensor in tensors)
    # An operator in place keeps its tensor's shape; the others broadcast, aligned at their last dimensions.
    operands = [
        (
            (1,) * (rank - tensor.dim()) + tuple(tensor.shape),
            [factor.reshape((1,) * (rank - tensor.dim()) + tuple(factor.shape)) for factor in tracer.labels(tensor)],
        )
        for tensor in tensors
    ]
    factors = meet(tracer, operands)
    for leaf in pytree.tree_leaves(out):
        if isinstance(leaf, Tensor):
            tracer.set(leaf, factors if leaf.dim() == rank else ())


def meet(tracer: Tracer, operands: list[tuple[tuple[int, ...], list[Tensor]]]) -> Factors:
    """Tie the factors of (shape, factors) operands that broadcast against each other; returns those of the outcome."""
    factors = []
    for dims in _clusters([factor for _, mine in operands for factor in mine]):
        labels, pinned = list[Tensor](), False
        for shape, mine in operands:
            if all(shape[dim] == 1 for dim in dims):
                continue  # broadcast along all of it
            own = [factor for factor in mine if set(varying(factor)) & dims]
            labels += own
            # One without labels has a size that can't change; two widths at once can't be told apart.
            pinned |= len(own) != 1
        first = labels[0]
        for other in labels[1:]:
            tracer.atoms.tie(first, other)
        if pinned:
            for factor in labels:
                tracer.atoms.pin(factor, f"it meets a tensor of fixed size in {tracer.where()}")
        size = [max(factor.shape[dim] for factor in labels) for dim in range(first.dim())]
        factors.append(first.expand(size))
    return tuple(factors)


def _clusters(factors: list[Tensor]) -> list[set[int]]:
    """The dimensions of factors that share dimensions, each set once."""
    clusters: list[set[int]] = []
    for factor in factors:
        mine = set(varying(factor))
        for cluster in [cluster for cluster in clusters if cluster & mine]:
            clusters.remove(cluster)
            mine |= cluster
        if mine:
            clusters.append(mine)
    return clusters


def move(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Elements go elsewhere: so do their labels, by the very same operator."""
    tensor, *rest = args
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    found: list[list[Tensor]] = [[] for _ in outs]
    name = func._schema.name.rpartition("::")[2].rstrip("_")
    if any(isinstance(leaf, Tensor) for leaf in rest):
        return unknown(tracer, func, args, kwargs, out)
    functional = getattr(torch.ops.aten, name)
    for factor in tracer.labels(tensor):
        if name in ("split", "split_with_sizes"):
            _note_sizes(tracer, factor, rest, kwargs)
        moved = functional(factor.expand(tensor.shape).contiguous(), *rest, **_without_format(kwargs))
        moved = list(moved) if isinstance(moved, (tuple, list)) else [moved]
        if name == "split" and len({part.shape for part in moved}) == 1:
            # Parts that are as long as each other stay so.
            for part in moved[1:]:
                tracer.atoms.tie(compressed(part), compressed(moved[0]))
        for one, part in zip(found, moved, strict=True):
            part = compressed(part)
            if name in _VIEWS:
                part = _split_width(tracer, factor, part, rest[0])
            one.append(part)
    for leaf, factors in zip(outs, found, strict=True):
        tracer.set(leaf, tuple(factors))


def index(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Places are looked up: a width that they number stays, the others go on."""
    x, *rest = args
    chosen = rest[0] if isinstance(rest[0], (list, tuple)) else [None] * (rest[0] % x.dim()) + [rest[1]]
    dims = {dim for dim, places in enumerate(chosen) if places is not None}
    if any(places is not None and places.dtype == torch.bool and places.dim() > 1 for places in chosen):
        return unknown(tracer, func, args, kwargs, out)  # counts dimensions otherwise
    factors = []
    functional = getattr(torch.ops.aten, func._schema.name.rpartition("::")[2])
    for factor in tracer.labels(x):
        if dims & set(varying(factor)):
            tracer.atoms.pin(factor, f"its places are numbered in {tracer.where()}")
        else:
            factors.append(functional(factor.expand(x.shape), *pytree.tree_map(_on_cpu, rest), **kwargs))
    for places in rest:
        tracer.pin(places, f"a number of places in {tracer.where()}")
    tracer.set(out, tuple(factors))


def _on_cpu(leaf: Any) -> Any:
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf


def scatter(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Places along one dimension are numbered; in the others, channels that meet are one."""
    x, dim, _, source = args[:4]
    if not isinstance(source, Tensor) or source.dim() != x.dim():
        return unknown(tracer, func, args, kwargs, out)
    operands = []
    for tensor in (x, source):
        if (numbered := tracer.along(tensor, dim)) is not None:
            tracer.atoms.pin(numbered, f"its places are numbered in {tracer.where()}")
        shape = tuple(1 if one == dim % x.dim() else size for one, size in enumerate(tensor.shape))
        operands.append((shape, [factor for factor in tracer.labels(tensor) if factor.shape[dim] == 1]))
    tracer.set(out, meet(tracer, operands))


def sequence(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Sequences are packed or padded: their features go on."""
    x = args[0]
    for factor in tracer.labels(x):
        if set(varying(factor)) - {x.dim() - 1}:
            tracer.atoms.pin(factor, f"sequences are packed in {tracer.where()}")
    width = tracer.along(x, -1)
    tracer.set(out[0], () if width is None else (spread(out[0].shape[-1], width, out[0].dim() - 1, out[0].dim()),))


def shuffle(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Groups are interleaved; they stay as long as each other."""
    x, groups = args[:2]
    labels = tracer.along(x, 1)
    if labels is not None:
        blocks = labels.view(groups, -1)
        tracer.atoms.tie(blocks, blocks[:1])
        tracer.set(out, (spread(x.shape[1], blocks.t().flatten(), 1, x.dim()),))


def _without_format(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "memory_format"}


def _note_sizes(tracer: Tracer, factor: Tensor, rest: list[Any], kwargs: dict[str, Any]) -> None:
    dim = rest[1] if len(rest) > 1 else kwargs.get("dim", 0)
    if factor.shape[dim] > 1:
        start = 0
        labels = _first_along(factor, dim)
        sizes = rest[0] if isinstance(rest[0], (list, tuple)) else [rest[0]]
        for size in sizes:
            tracer.sizes.append(Size(tracer.path, int(size), labels[start : start + size]))
            start += size


def _first_along(factor: Tensor, dim: int) -> Tensor:
    return factor.movedim(dim, 0).reshape(factor.shape[dim], -1)[:, 0]


def _split_width(tracer: Tracer, before: Tensor, after: Tensor, sizes: Any) -> Tensor:
    """Where a view splits one width into several dimensions, only one of them can shrink: choose which."""
    if len(varying(after)) > len(varying(before)):
        key = f"{tracer.path}:{list(after.shape)}"
        dims = varying(after)
        options = _split_options(tracer, after, list(sizes))
        keep = options[tracer.choices.get(key, 0) % len(options)]
        tracer.splits.setdefault(key, []).append(after.flatten())
        flat = after
        for dim in dims:
            if dim not in keep:
                first = flat.narrow(dim, 0, 1)
                tracer.atoms.tie(flat, first)
                flat = first
        after = flat
    for dim in varying(after):
        if dim < len(sizes) and sizes[dim] > 1:
            labels = _first_along(after, dim)
            tracer.sizes.append(Size(tracer.path, int(sizes[dim]), labels))
    return after


def _split_options(tracer: Tracer, after: Tensor, sizes: list[int]) -> list[tuple[int, ...]]:
    """The dimensions that may go on telling channels apart, the likeliest first."""
    dims = varying(after)
    numbers = tracer.numbers.get(tracer.path, set())
    options: list[tuple[int, ...]] = []
    # Blocks whose number is an attribute of the module, as of heads; what lies inside a block stays whole.
    blocks = [place for place, dim in enumerate(dims[:-1]) if len(_first_along(after, dim).unique()) in numbers]
    options += [dims[: place + 1] for place in reversed(blocks)]
    options += [(dim,) for dim in dims if sizes[dim] == -1]
    options += [dims[-1:], dims[:1]]
    return list(dict.fromkeys(options))


def cat(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Side by side along one dimension; in the others, channels that meet are one."""
    tensors = [tensor for tensor in args[0] if tensor.numel()]
    rank = out.dim()
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % rank
    if func._schema.name.endswith("stack"):
        operands = [
            ((*tensor.shape[:dim], 1, *tensor.shape[dim:]), [f.unsqueeze(dim) for f in tracer.labels(tensor)])
            for tensor in tensors
        ]
        tracer.set(out, meet(tracer, operands))
        return
    across, aside = [], list[list[Tensor]]()
    for tensor in tensors:
        mine = tracer.labels(tensor)
        across.append([factor for factor in mine if factor.shape[dim] == 1])
        here = tracer.along(tensor, dim)
        aside.append([] if here is None else [here])
    shapes = [tuple(1 if one == dim else size for one, size in enumerate(tensor.shape)) for tensor in tensors]
    factors = list(meet(tracer, list(zip(shapes, across, strict=True))))
    if any(aside):
        joined = [
            labels[0] if labels else torch.zeros(tensor.shape[dim], dtype=torch.int64)
            for tensor, labels in zip(tensors, aside, strict=True)
        ]
        factors.append(spread(out.shape[dim], torch.cat(joined), dim, rank))
    tracer.set(out, tuple(factors))


def product(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """A matrix product: the contracted width ends, the others go on. A bias comes first in its operators."""
    *bias, left, right = (
        args[:3] if func._schema.name.rpartition("::")[2].startswith(("addmm", "baddbmm")) else args[:2]
    )
    inner = tracer.same((left, -1), (right, -2))
    rank = out.dim()
    factors = []
    batch = None
    if rank == 3:
        batch = tracer.same((left, 0), (right, 0))
        if batch is not None:
            factors.append(spread(out.shape[0], batch, 0, rank))
    rows, columns = tracer.along(left, -2), tracer.along(right, -1)
    for labels, dim in ((rows, rank - 2), (columns, rank - 1)):
        if labels is not None:
            factors.append(spread(out.shape[dim], labels, dim, rank))
    tracer.costs(out.numel() * left.shape[-1], inner, rows, columns, batch)
    if bias:
        shape = (1,) * (rank - bias[0].dim()) + tuple(bias[0].shape)
        own = [factor.reshape((1,) * (rank - bias[0].dim()) + tuple(factor.shape)) for factor in tracer.labels(bias[0])]
        factors = list(meet(tracer, [(tuple(out.shape), factors), (shape, own)]))
    tracer.set(out, tuple(factors))


def convolution(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Each group of outputs sees its group of inputs."""
    x, weight, bias, groups = args[0], args[1], args[2], args[8]
    transposed = bool(args[6])
    ins, outs = (0, 1) if transposed else (1, 0)
    batched = x.dim() == weight.dim()
    channel = 1 if batched else 0
    for dim in range(2, weight.dim()):
        if (kernel := tracer.along(weight, dim)) is not None:
            tracer.atoms.pin(kernel, "the kernel's size")
    macs = (x.numel() if transposed else out.numel()) * weight[0].numel()
    if groups == 1:
        inner = tracer.same((x, channel), (weight, ins))
        outer = tracer.along(weight, outs)
        widths = [inner, outer]
    else:
        outer, widths = _grouped(tracer, x, channel, weight, groups, transposed)
    tracer.costs(macs, *widths)
    if outer is not None and bias is not None:
        biases = tracer.along(bias, 0)
        if biases is None:
            tracer.atoms.pin(outer, "a bias of fixed size")
        else:
            tracer.atoms.tie(outer, biases)
    tracer.set(out, () if outer is None else (spread(out.shape[channel], outer, channel, out.dim()),))


def _grouped(
    tracer: Tracer, x: Tensor, channel: int, weight: Tensor, groups: int, transposed: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The output's atoms of a grouped convolution, and the widths that its cost hangs on."""
    inputs = tracer.along(x, channel)
    per_in = x.shape[channel] // groups
    # A grouped weight is (out, in / groups), transposed (in, out / groups).
    whole, part = tracer.along(weight, 0), tracer.along(weight, 1)
    per_out = weight.shape[1] if transposed else weight.shape[0] // groups
    if inputs is None:
        for labels in (whole, part):
            if labels is not None:
                tracer.atoms.pin(labels, f"groups of a fixed input in {tracer.where()}")
        return None, []
    if whole is None or (part is None and weight.shape[1] > 1):
        tracer.atoms.pin(inputs, f"grouped weights that are computed, in {tracer.where()}")
        return None, []
    if groups >= per_in:
        # Whole groups go, with all their inputs and outputs.
        blocks = inputs.view(groups, per_in)
        tracer.atoms.tie(blocks, blocks[:, :1])
        tracer.atoms.tie(whole.view(groups, -1), blocks[:, :1])
        if part is not None:
            tracer.atoms.pin(part, "inputs or outputs within a group")
        tracer.sizes.append(Size(tracer.path, groups, blocks[:, 0]))
        return (blocks[:, 0].repeat_interleave(per_out) if transposed else whole), [blocks[:, 0]]
    # The same places go in every group.
    blocks = inputs.view(groups, per_in)
    tracer.atoms.tie(blocks, blocks[:1])
    outer = part if transposed else whole
    other = whole if transposed else part
    if other is not None:
        other = other.view(groups, per_in) if transposed else other
        tracer.atoms.tie(other, blocks)
    if outer is None:
        return None, [blocks[0]]
    if transposed:
        return outer.repeat(groups), [blocks[0], outer]
    outs = outer.view(groups, per_out)
    tracer.atoms.tie(outs, outs[:1])
    return outer, [blocks[0], outs[0]]


def batch_norm(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Channel by channel."""
    x = args[0]
    others = [tensor for tensor in args[1:5] if isinstance(tensor, Tensor)]
    labels = tracer.same((x, 1), *((tensor, 0) for tensor in others))
    if labels is not None:
        tracer.sizes.append(Size(tracer.path, x.shape[1], labels))
    tracer.set(out[0], () if labels is None else (spread(x.shape[1], labels, 1, x.dim()),))


def layer_norm(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Each channel's value depends on all."""
    x, shape, *affine = args[:4]
    out = out[0] if isinstance(out, tuple) else out
    if len(shape) > 1 or not isinstance(affine[0], Tensor):
        tracer.pin(x, f"a norm over several dimensions, or without weights of its own, in {tracer.where()}")
        return None
    others = [tensor for tensor in affine if isinstance(tensor, Tensor)]
    kept = [factor for factor in tracer.labels(x) if factor.shape[-1] == 1]
    labels = tracer.same((x, -1), *((tensor, 0) for tensor in others))
    if labels is not None:
        tracer.atoms.span(labels, f"a norm spans it, in {tracer.where()}")
        kept.append(spread(x.shape[-1], labels, x.dim() - 1, x.dim()))
    tracer.set(out, tuple(kept))


def group_norm(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Each channel's value depends on all of its group; groups stay as long as each other."""
    x, weight, bias, groups = args[0], args[1], args[2], args[6]
    others = [tensor for tensor in (weight, bias) if tensor is not None]
    labels = tracer.same((x, 1), *((tensor, 0) for tensor in others))
    if labels is None:
        return
    if groups == x.shape[1]:
        tracer.atoms.pin(labels, f"as many groups as channels, in {tracer.where()}")
    tracer.atoms.span(labels, f"a norm spans it, in {tracer.where()}")
    tracer.sizes.append(Size(tracer.path, x.shape[1], labels))
    blocks = labels.view(groups, -1)
    tracer.atoms.tie(blocks, blocks[:1])
    tracer.set(out[0], (spread(x.shape[1], labels, 1, x.dim()),))


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
            tracer.atoms.tie(factor, factor.narrow(dim, 0, 1))
            factor = factor.narrow(dim, 0, 1)
        factors.append(factor)
    for leaf in pytree.tree_leaves(out):
        tracer.set(leaf, tuple(factors))


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
    x = args[0]
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    dims, keep = given.get("dim"), bool(given.get("keepdim", False))
    dims = list(range(x.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    gone = {dim % x.dim() for dim in dims} if x.dim() else set()
    name = func._schema.name.rpartition("::")[2]
    factors = []
    for factor in tracer.labels(x):
        if gone & set(varying(factor)):
            tracer.atoms.span(factor, f"`{name}` runs over it, in {tracer.where()}", lasting=name in _ORDERED)
            if set(varying(factor)) - gone:
                tracer.atoms.pin(factor, f"`{name}` runs over a part of it, in {tracer.where()}")
            continue
        factors.append(factor if keep else _without(factor, gone))
    for leaf in pytree.tree_leaves(out):
        tracer.set(leaf, tuple(factors))


def _without(factor: Tensor, dims: set[int]) -> Tensor:
    return factor.reshape([size for dim, size in enumerate(factor.shape) if dim not in dims])


def softmax(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """As a reduction, but the width goes on."""
    x = args[0]
    dim = args[1] if len(args) > 1 and isinstance(args[1], int) else kwargs.get("dim", -1)
    name = func._schema.name.rpartition("::")[2].strip("_")
    for factor in tracer.labels(x):
        if x.dim() and factor.shape[dim] > 1:
            tracer.atoms.span(factor, f"`{name}` runs over it, in {tracer.where()}")
    for leaf in pytree.tree_leaves(out):
        tracer.set(leaf, tracer.labels(x))


def glu(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Two halves meet."""
    x = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    factors = []
    for factor in tracer.labels(x):
        if factor.shape[dim] > 1:
            factor, other = factor.chunk(2, dim)
            tracer.atoms.tie(factor, other)
        factors.append(factor)
    tracer.set(out, tuple(factors))


def embedding(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Rows are looked up."""
    weight = args[0]
    out = out[0] if isinstance(out, tuple) else out
    if (rows := tracer.along(weight, 0)) is not None:
        tracer.atoms.pin(rows, "the rows of an embedding")
    width = tracer.along(weight, 1)
    tracer.set(out, () if width is None else (spread(out.shape[-1], width, out.dim() - 1, out.dim()),))


def attention(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Scaled dot products: heads go together, and with grouped queries all of a group's."""
    query, key, value = args[:3]
    out = out[0] if isinstance(out, tuple) else out
    if (inner := tracer.same((query, -1), (key, -1))) is not None:
        tracer.atoms.span(inner, f"attention's scale hangs on it, in {tracer.where()}")
    masks = [one for one in (*args[3:], *kwargs.values()) if isinstance(one, Tensor)]
    factors: list[Tensor] = []
    heads = None
    if query.dim() == 4:
        heads = tracer.along(query, 1)
        repeat = query.shape[1] // key.shape[1]
        theirs = tracer.same((key, 1), (value, 1))
        if heads is not None and theirs is not None:
            tracer.atoms.tie(heads, theirs.repeat_interleave(repeat))
        for labels in (heads, theirs):
            if labels is not None and (heads is None or theirs is None):
                tracer.atoms.pin(labels, f"it meets a fixed number of heads in {tracer.where()}")
        if heads is not None:
            factors.append(spread(query.shape[1], heads, 1, 4))
            for mask in masks:
                if mask.dim() == 4 and mask.shape[1] > 1:
                    _mask_heads(tracer, mask, heads)
    if (width := tracer.along(value, -1)) is not None:
        factors.append(spread(value.shape[-1], width, out.dim() - 1, out.dim()))
    macs = math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    tracer.costs(macs, heads)
    tracer.set(out, tuple(factors))


def _mask_heads(tracer: Tracer, mask: Tensor, heads: Tensor) -> None:
    theirs = tracer.along(mask, 1)
    if theirs is not None:
        tracer.atoms.tie(heads, theirs)
    elif mask.stride(1):
        tracer.atoms.pin(heads, f"a mask with a part for each head, in {tracer.where()}")


def weight_norm(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """A direction and its magnitudes: the magnitudes are set anew when inputs go, so that weights stay."""
    direction, magnitude, dim = (*args, 0)[:3]
    if magnitude.dim():
        tracer.same((direction, dim), (magnitude, dim))
    for leaf in out:
        if leaf.shape == direction.shape:
            tracer.set(leaf, tracer.labels(direction))


def pixel_shuffle(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """``r²`` channels become one."""
    x, factor = args[0], args[1]
    labels = tracer.along(x, -3)
    if labels is None:
        return
    if func._schema.name.endswith("unshuffle"):
        labels = labels.repeat_interleave(factor * factor)
    else:
        blocks = labels.view(-1, factor * factor)
        tracer.atoms.tie(blocks, blocks[:, :1])
        labels = blocks[:, 0]
    tracer.set(out, (spread(len(labels), labels, out.dim() - 3, out.dim()),))


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), product),
    **dict.fromkeys(("convolution", "_convolution"), convolution),
    **dict.fromkeys(("cat", "stack"), cat),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), layer_norm),
    "native_group_norm": group_norm,
    **dict.fromkeys(("index", "index_select"), index),
    **dict.fromkeys(("index_add", "index_copy", "scatter_add", "scatter_reduce", "scatter"), scatter),
    **dict.fromkeys(("_pack_padded_sequence", "_pad_packed_sequence"), sequence),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), shuffle),
    "constant_pad_nd": pad,
    "glu": glu,
    **dict.fromkeys(("embedding", "_embedding_bag"), embedding),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
        ),
        attention,
    ),
    "_weight_norm_interface": weight_norm,
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), pixel_shuffle),
}
