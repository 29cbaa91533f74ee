"""Counts the architectures that lose half of their multiply-accumulates, and checks what is left of them.

Each is planned and cut in a process of its own, within 90 s of CPU time. What comes out is measured:
multiply-accumulates by torch's counter; outputs against a copy whose channels are zeroed here, by the plan's indices; a
forward and a backward pass in training mode. Results are appended to a file as they come, and what it holds isn't
measured again, so a run may be broken off, and two commits may be compared:

    python benchmarks/architectures.py --results before.jsonl --only "timm/*"     # patterns
    python benchmarks/architectures.py --list                                     # the rows
    python benchmarks/architectures.py --table before.jsonl after.jsonl           # the table of what was measured

    PYTHONPATH=... python benchmarks/architectures.py --by torch-pruning --results other.jsonl   # another package

torch-pruning is used as by hand: global ranks by magnitude, heads told where modules have their number, layers that
make outputs left out, sizes of heads set afterwards, its ratio halved eight times towards the budget.

A row is left out, with a word, where its package isn't installed: timm, torchvision, transformers, pytorchcv,
segmentation-models-pytorch, monai, ultralytics, denoising-diffusion-pytorch, diffusers, x-transformers, vit-pytorch.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import logging
import math
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from architectures_rows import Row, rows
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import CompressionError, plan_removal, remove_channels_

BUDGET, REACHED = 0.5, 0.52
SECONDS = 90
Result = dict[str, Any]


def call(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that a model puts out, with the same draws each time."""
    torch.manual_seed(0)
    out = model(*args, **kwargs)
    leaves = pytree.tree_leaves(dict(out) if isinstance(out, Mapping) else out)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def macs(model: nn.Module, args: Any, kwargs: Any) -> int:
    """By torch's counter, out of sight of which are fused kernels of recurrences and of attention: these are off."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    plain = torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH)
    experts = {
        torch.ops.aten._grouped_mm: lambda left, right, *_, **__: 2 * math.prod(left) * right[-1]
    }  # not known yet
    with FlopCounterMode(display=False, custom_mapping=experts) as counter, torch.no_grad(), plain[0], plain[1]:
        call(copy.deepcopy(model).eval().requires_grad_(False), args, kwargs)
    torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2


@torch.no_grad()
def zero_(model: nn.Module, indices_by_name: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Zero all but what a plan keeps."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in indices_by_name.keys() & tensors.keys():  # caches of this copy are empty
        for dim, indices in indices_by_name[name].items():
            gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
            gone[indices] = False
            tensors[name].index_fill_(dim, gone.nonzero().flatten(), 0)


def difference(cut: nn.Module, zeroed: nn.Module, args: Any, kwargs: Any) -> float:
    """The largest difference of two models' outputs, to the largest output; in float64 where the models run in it."""
    pair = [copy.deepcopy(model).eval() for model in (cut, zeroed)]

    def double(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    with torch.no_grad():
        try:
            outputs = [call(model.double(), *pytree.tree_map(double, (args, kwargs))) for model in pair]
        except Exception:
            outputs = [call(model, args, kwargs) for model in (cut.eval(), zeroed.eval())]
    if [output.shape for output in outputs[0]] != [output.shape for output in outputs[1]]:
        return float("inf")
    found = [
        float((output.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30))
        for output, other in zip(*outputs, strict=True)
        if output.numel() and output.is_floating_point()
    ]
    return max(found, default=0.0)


def trains(model: nn.Module, args: Any, kwargs: Any) -> str:
    """What goes wrong in a forward and a backward pass; empty if nothing does."""
    try:
        outputs = call(model.train(), args, kwargs)
        sum(output.float().pow(2).mean() for output in outputs if output.is_floating_point()).backward()  # type: ignore[union-attr]
    except Exception as error:
        return line(error)
    return ""


def line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


@contextmanager
def limited() -> Iterator[float]:
    """End what runs inside after `SECONDS` of CPU time."""
    start = time.process_time()
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(start) + SECONDS, hard))
    try:
        yield start
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))


def measure(row: Row) -> Result:
    torch.manual_seed(0)
    model, args, kwargs = row.build()
    whole = copy.deepcopy(model)
    with torch.no_grad():
        shapes = [leaf.shape for leaf in call(copy.deepcopy(model).eval(), args, kwargs)]
    before, trained_before = macs(model, args, kwargs), trains(copy.deepcopy(model), args, kwargs)
    result: Result = {"fraction": 1.0, "seconds": 0.0, "difference": None, "stays": [], "problem": ""}
    with limited() as start:
        try:
            plan = plan_removal(model, args or kwargs, macs=BUDGET)
            remove_channels_(model, plan)
        except CompressionError as error:
            return {**result, "seconds": round(time.process_time() - start, 1), "problem": f"refused: {line(error)}"}
    result["seconds"] = round(time.process_time() - start, 1)
    result["stays"] = [f"{layer}: {reason}" for layer, reason in plan.fixed.items()]
    result["fraction"] = round(macs(model, args, kwargs) / before, 4)
    if not any(name.endswith((".original1", "weight_v")) for name in plan.kept):  # a weight norm isn't linear
        zero_(whole, plan.kept)
        result["difference"] = difference(model, whole, args, kwargs)
    with torch.no_grad():
        if [leaf.shape for leaf in call(copy.deepcopy(model).eval(), args, kwargs)] != shapes:
            result["problem"] = "its outputs have another size"
    if not trained_before and (fault := trains(model, args, kwargs)):
        result["problem"] = f"it doesn't train: {fault}"
    return result


def measure_other(row: Row) -> Result:
    """The same by torch-pruning."""
    torch.manual_seed(0)
    model, args, kwargs = row.build()
    with torch.no_grad():
        shapes = [leaf.shape for leaf in call(copy.deepcopy(model).eval(), args, kwargs)]
    before = macs(model, args, kwargs)
    result: Result = {"fraction": 1.0, "seconds": 0.0, "difference": None, "stays": [], "problem": ""}
    with limited() as start:
        low, high, tried = 0.0, 1.0, []
        for _ in range(8):
            middle = (low + high) / 2
            try:
                cut = cut_by_hand(copy.deepcopy(model).eval(), args, kwargs, middle)
                fraction = macs(cut, args, kwargs) / before
                with torch.no_grad():
                    if [leaf.shape for leaf in call(cut, args, kwargs)] != shapes:
                        result["problem"] = "its outputs have another size"
                        break
            except Exception as error:
                result["problem"] = line(error)
                break
            tried.append(fraction)
            low, high = (low, middle) if fraction <= BUDGET else (middle, high)
    result["seconds"] = round(time.process_time() - start, 1)
    result["fraction"] = round(min(tried, key=lambda fraction: abs(fraction - BUDGET), default=1.0), 4)
    return result


def cut_by_hand(model: nn.Module, args: Any, kwargs: Any, ratio: float) -> nn.Module:
    import torch_pruning

    def differentiable(outputs: Any) -> list[Tensor]:
        leaves = pytree.tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]

    made: dict[nn.Module, Tensor] = {}
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | _ConvNd)]
    hooks = [layer.register_forward_hook(lambda layer, _, out: made.update({layer: out})) for layer in layers]
    outputs = {leaf.data_ptr() for leaf in differentiable(model(*args, **kwargs))}
    for hook in hooks:
        hook.remove()
    heads, attending = dict[nn.Module, int](), list[tuple[Any, nn.Linear, int]]()
    for module in model.modules():
        number = getattr(module, "num_heads", getattr(module, "num_attention_heads", None))
        for name, layer in module.named_children() if isinstance(number, int) else ():
            if isinstance(layer, nn.Linear) and name[:3] in _ATTENDING:
                heads[layer] = number
                attending.append((module, layer, number * {"qkv": 3, "kv": 2}.get(name, 1)))
    pruner = torch_pruning.pruner.BasePruner(
        model,
        args if args else kwargs,
        importance=torch_pruning.importance.MagnitudeImportance(),
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[layer for layer, out in made.items() if out.data_ptr() in outputs],
        num_heads=heads,
        output_transform=differentiable,
    )
    pruner.step()
    for module, layer, parts in attending:  # what follows is set by hand
        for name in ("head_dim", "attention_head_size"):
            if hasattr(module, name):
                setattr(module, name, layer.out_features // parts)
        for name in ("all_head_size", "attn_dim"):
            if hasattr(module, name):
                setattr(module, name, layer.out_features // (parts // heads[layer]))
    return model


_ATTENDING = {"q", "k", "v", "qkv", "que", "key", "val", "q_p", "k_p", "v_p", "kv"}


class Slow(BaseException):
    """No Exception, so that no code on the way takes it for an error of its own."""


def _stop(*_: Any) -> None:
    raise Slow(f"more than {SECONDS} s")


def _child(row: Row, pipe: Any, measure: Callable[[Row], Result]) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    signal.signal(signal.SIGXCPU, _stop)
    try:
        pipe.send(measure(row))
    except BaseException as error:
        pipe.send({"fraction": 1.0, "seconds": None, "difference": None, "stays": [], "problem": line(error)})


def in_a_process(row: Row, measure: Callable[[Row], Result]) -> Result:
    """What is measured; a crash is a result too."""
    context = multiprocessing.get_context("fork")
    pipe, other = context.Pipe()
    process = context.Process(target=_child, args=(row, other, measure))
    process.start()
    other.close()
    try:
        result: Result = pipe.recv()
    except EOFError:
        process.join()
        result = {"fraction": 1.0, "seconds": None, "difference": None, "stays": []}
        result["problem"] = f"its process ended with {process.exitcode}"
    process.join()
    return result


def installed(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def read(path: Path) -> dict[str, Result]:
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text("utf-8").splitlines())
    return {line.pop("row"): line for line in lines}


def run(path: Path, patterns: list[str], measure: Callable[[Row], Result]) -> None:
    known = read(path)
    for row in rows():
        name = f"{row.package}/{row.name}"
        if name in known or not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        if not installed(row.package):
            print(f"{name}: left out, {row.package} isn't installed", file=sys.stderr)
            continue
        result = in_a_process(row, measure)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"row": name, **result}) + "\n")
        print(f"{name}: {verdict(result)}, {result['seconds']} s {result['problem']}", file=sys.stderr, flush=True)


def verdict(result: Result) -> str:
    """What of its multiply-accumulates is left, or why that is no number."""
    if result["problem"]:
        problem = result["problem"]
        return "refused" if problem.startswith("refused") else "slow" if problem.startswith("Slow") else "fails"
    wrong = result["difference"] is not None and not result["difference"] <= 1e-3
    return f"{result['fraction']:.3f}" + (" (differs)" if wrong else "")


def table(paths: list[Path]) -> None:
    """Markdown: every row, and how many reach the budget."""
    columns = [read(path) for path in paths]
    names = list(dict.fromkeys(name for column in columns for name in column))
    heads = [f"{path.stem} | s" for path in paths]
    print(f"| Architecture | {' | '.join(heads)} |\n|:--|{'--:|--:|' * len(paths)}")
    for name in names:
        cells = [
            f"{verdict(column[name])} | {column[name]['seconds'] or ''}" if name in column else " | "
            for column in columns
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    print()
    for path, column in zip(paths, columns, strict=True):
        found = [verdict(result) for result in column.values()]
        reached = sum(text[0].isdigit() and "differs" not in text and float(text) <= REACHED for text in found)
        words = {word: sum(word in text for text in found) for word in ("refused", "slow", "fails", "differs")}
        rest = ", ".join(f"{count} {word}" for word, count in words.items())
        print(f"{path.stem}: {reached} of {len(found)} keep at most {REACHED} of their multiply-accumulates; {rest}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="the file that results are appended to; by default a new one")
    parser.add_argument("--only", default="*", help="patterns of package/name, by commas")
    parser.add_argument("--by", choices=["torch-pruning"], help="another package, which is installed by hand")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", type=Path, nargs="+", metavar="RESULTS")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{row.package}/{row.name}" for row in rows()))
    elif options.table:
        table(options.table)
    else:
        results = options.results or Path(tempfile.mkdtemp()) / "results.jsonl"
        run(results, options.only.split(","), measure_other if options.by else measure)
        table([results])


if __name__ == "__main__":
    main()
