"""`RuntimeModule`: a module whose forward runs an exported file, called as the model was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.export.formats import FORMATS
from lightning_compress.export.nest import described, gathered, named
from lightning_compress.export.program import BATCH
from lightning_compress.export.runtimes import RUNTIMES, Session
from lightning_compress.export.sidecar import read_sidecar


class RuntimeModule(nn.Module):
    """Runs an exported file in its runtime: in a notebook, in a server, or in a test step in the model's place.

    It is called as the model was when it was exported, by position or by name, and gives back dicts, tuples and lists
    as the model did; of a named tuple or a dataclass, the dict of its fields. An argument that is None counts as one
    that isn't given. Batches may have any size: a file for a fixed size, or up to one, runs in chunks, and the last
    one is filled up with its last sample. Outputs come on the device of the inputs and have no gradients.

    Copies and pickles hold the path alone, and open the file when they are first called.

    Args:
        path: of the file; its sidecar, ``<path>.json``, stands beside it.
        runtime: ``onnxruntime`` or ``openvino`` for an ``.onnx`` file; by default the one that the file is for.
        threads: of the runtime; as many as torch has by default.

    Attributes:
        facts: what the sidecar says.

    Raises:
        CompressionError: in the constructor, the file or its sidecar is missing, was changed after it, or isn't for
            this runtime; when called, the arguments aren't those of the model, or of other types or shapes.
        MissingExtraError: the runtime isn't installed.

    Example:
        >>> # module = RuntimeModule("model.onnx")
        >>> # logits = module(images)
    """

    def __init__(self, path: str | Path, runtime: str | None = None, threads: int | None = None) -> None:
        super().__init__()
        if not isinstance(path, str | Path):
            raise invalid("path", "be the path of a file", path)
        self.path = str(Path(path).absolute())  # where it stays, wherever the process goes
        self.facts = read_sidecar(path)
        self.runtime = str(self.facts["runtime"]) if runtime is None else runtime
        self.threads = threads
        known = {form.runtime for form in FORMATS.values() if form.suffix == Path(path).suffix}
        if self.runtime not in known:
            raise invalid("runtime", f"be one of {', '.join(sorted(known))} for {Path(path).name}", self.runtime)
        self._session: Session | None = None
        self._open()

    def _open(self) -> Session:
        if self._session is None:
            self.facts = read_sidecar(self.path)
            self._session = RUNTIMES[self.runtime].open(Path(self.path), threads=self.threads)
        return self._session

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_session": None}

    def extra_repr(self) -> str:
        """Say which file, and where it runs."""
        return f"{self.path!r}, runtime={self.runtime!r}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file; see the class."""
        session = self._open()
        tensors = self._bound(args, kwargs)
        outputs = [output.to(tensors[0].device) for output in self._in_chunks(session, tensors)]
        return gathered(self.facts["result"], outputs)

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the tensors of a call in the order in which the file takes them."""
        given: list[Tensor] = []
        call = _by_name(described((args, kwargs), given), self.facts["parameters"])
        expected = _by_name(self.facts["call"], self.facts["parameters"])
        for name in call.keys() - expected.keys():
            raise invalid("forward", f"take {', '.join(expected)}", name, nearest(name, expected))
        for name in expected.keys() - call.keys():
            raise CompressionError(f"`forward` must get `{name}`. Received: {', '.join(call) or 'nothing'}.")
        places = dict[int, int]()
        for name, plain in expected.items():
            places.update(_matched(plain, call[name], name))
        tensors = [given[places[number]].detach() for number in range(len(places))]
        sizes = _check(self.facts["inputs"], tensors, self._fixed)
        for name, most in self.facts.get("largest", {}).items():
            if sizes.get(name, 0) > most:
                raise CompressionError(f"`{name}` must be at most {most}, as in the file. Received: {sizes[name]}.")
        return tensors

    def _in_chunks(self, session: Session, tensors: list[Tensor]) -> list[Tensor]:
        """Run a batch of any size; what isn't counted in samples must be the same for all chunks."""
        fixed = self._fixed
        batched = [_counts_samples(entry, fixed) for entry in self.facts["inputs"]]
        samples = next((len(tensor) for tensor, counts in zip(tensors, batched, strict=True) if counts), 0)
        most = fixed or self.facts["max_batch"] or samples
        if samples == most or not any(batched):
            return session(tensors)
        if not samples:
            raise invalid("forward", f"get samples, as {Path(self.path).name} is for batches of {most}", samples)
        sizes, chunks = list[int](), list[list[Tensor]]()
        for start in range(0, samples, most):
            sizes.append(fixed or min(most, samples - start))
            parts = zip(tensors, batched, strict=True)
            chunks.append(session([_chunk(tensor, start, sizes[-1]) if counts else tensor for tensor, counts in parts]))
        return [_joined(parts, sizes, samples, name) for name, *parts in zip(self._output_names, *chunks, strict=True)]

    @property
    def _output_names(self) -> tuple[str, ...]:
        return named(self.facts["result"], (), "output")

    @property
    def _fixed(self) -> int | None:
        """The only size of a batch that the file takes; None where it takes several."""
        return None if self.facts["batch"] == "dynamic" else int(self.facts["batch"])


def _by_name(call: Any, parameters: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a described call by their names; what isn't given, or None, is left out."""
    args, kwargs = (next(iter(part.values())) for part in call["tuple"])
    names = [*parameters, *(f"argument {number}" for number in range(len(parameters), len(args)))]
    found = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: part for name, part in found.items() if part != {"value": None}}


def _matched(expected: Any, given: Any, path: str) -> Iterator[tuple[int, int]]:
    """Yield the numbers of tensors in the same places of two described nests."""
    kinds = [plain if isinstance(plain, int) else next(iter(plain)) for plain in (expected, given)]
    if isinstance(expected, int) and isinstance(given, int):
        yield expected, given
        return
    if "value" in kinds or isinstance(expected, int) or isinstance(given, int):
        if expected != given:
            raise CompressionError(f"`{path}` must be {_said(expected)}, as in the file. Received: {_said(given)}.")
        return
    keyed = [dict(_items(next(iter(plain.values())))) for plain in (expected, given)]
    if keyed[0].keys() != keyed[1].keys():
        raise CompressionError(f"`{path}` must hold {', '.join(keyed[0])}. Received: {', '.join(keyed[1])}.")
    for key, part in keyed[0].items():
        yield from _matched(part, keyed[1][key], f"{path}.{key}")


def _items(parts: Any) -> Iterator[tuple[str, Any]]:
    pairs = parts.items() if isinstance(parts, Mapping) else enumerate(parts)
    return ((str(key), part) for key, part in pairs)


def _said(plain: Any) -> str:
    if isinstance(plain, int):
        return "a tensor"
    [(kind, parts)] = plain.items()
    return repr(parts) if kind == "value" else f"a {kind}"


def _check(entries: Sequence[Mapping[str, Any]], tensors: Sequence[Tensor], fixed: int | None) -> dict[str, int]:
    """Return the sizes that vary; raise where a tensor isn't of the type or shape that the file takes."""
    sizes: dict[str, int] = {}
    for entry, tensor in zip(entries, tensors, strict=True):
        name, kind, shape = entry["name"], entry["dtype"], list(entry["shape"])
        if _counts_samples(entry, fixed):
            shape[0] = BATCH
        if str(tensor.dtype) != f"torch.{kind}":
            raise CompressionError(
                f"`{name}` must be of torch.{kind}. Received: {tensor.dtype}. Convert it: {name}.to(torch.{kind})."
            )
        received = list(tensor.shape)
        sized = zip(shape, received, strict=False)
        expected = [sizes.setdefault(size, at) if isinstance(size, str) else size for size, at in sized]
        if len(shape) != len(received) or expected != received:
            raise CompressionError(f"`{name}` must have the shape {tuple(shape)}. Received: {tuple(received)}.")
    return sizes


def _counts_samples(entry: Mapping[str, Any], fixed: int | None) -> bool:
    """Tell whether dimension 0 of a tensor counts samples."""
    return bool(entry["shape"]) and entry["shape"][0] in (BATCH, fixed)


def _chunk(tensor: Tensor, start: int, size: int) -> Tensor:
    """Return ``size`` samples; where there are fewer, the last one again."""
    part = tensor[start : start + size]
    return torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])]) if len(part) < size else part


def _joined(parts: Sequence[Tensor], sizes: Sequence[int], samples: int, name: str) -> Tensor:
    """Join the outputs of chunks of these ``sizes``."""
    if all(part.shape[:1] == (size,) for part, size in zip(parts, sizes, strict=True)):
        return torch.cat(list(parts))[:samples]
    if all(torch.equal(part, parts[0]) for part in parts):
        return parts[0]
    raise CompressionError(
        f"A batch of {samples} samples must run at once, since `{name}` is a value of the whole batch. Received: a "
        "file for fewer. Export it with a dynamic batch size."
    )
