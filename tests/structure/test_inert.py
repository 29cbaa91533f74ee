"""`inert`: a file's weights are read whatever else it holds, and nothing in it is run."""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import CompressionError, ScheduledPruning, load_compressed
from lightning_compress.distillation import load_weights_
from lightning_compress.structure.inert import read_inert
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, snapshot

RAN = Path("ran")
left_out = pytest.mark.filterwarnings("ignore:.*reads weights and plain data alone")


class Calls:
    """Pickled as a call of something."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class SetsState:
    """Of the user's project, with a ``__setstate__`` that does something."""

    def __init__(self) -> None:
        self.number = 1

    def __setstate__(self, state: Any) -> None:
        RAN.touch()


class Listed(list[int]):
    """A subclass of list, which a pickle fills item by item."""


class Mapped(dict[str, int]):
    """A subclass of dict."""


TOUCH = f"touch {RAN}"
HOSTILE = {
    "os.system": lambda: Calls(os.system, TOUCH),
    "eval": lambda: Calls(eval, f"open({str(RAN)!r}, 'w')"),
    "subprocess": lambda: Calls(subprocess.Popen, ["touch", str(RAN)]),
    "a partial that is called": lambda: Calls(functools.partial(os.system, TOUCH)),
    "getattr": lambda: Calls(getattr, os.path.join, "__globals__"),
    "a pickle in a pickle": lambda: Calls(torch.storage._load_from_bytes, b"whatever"),
    "torch.load": lambda: Calls(torch.load, "other.ckpt"),
    "torch.hub": lambda: Calls(torch.hub.load, "repo", "model"),
    "a tensor's type": lambda: Calls(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (TOUCH,), {}),
    "a parameter": lambda: Calls(torch._utils._rebuild_parameter, Calls(os.system, TOUCH), True, OrderedDict()),
    "__setstate__": SetsState,
}
HARMLESS = {
    "a network": nn.Linear(2, 2),
    "a class": Classifier,
    "a function": os.path.join,
    "a partial": functools.partial(torch.optim.Adam, lr=0.1),
    "a numpy scalar": np.float64(2.0),
    "an array": np.ones(2),
    "a path": Path("a"),
    "a list of one's own": Listed([1, 2]),
    "a dict of one's own": Mapped(a=1),
    "a default dict": defaultdict(list, {1: [2]}),
    "a tensor of its own kind": Calls(torch._utils._rebuild_wrapper_subclass, Classifier),
    "a slice": slice(1),
}


def saved(path: Path, **entries: Any) -> Classifier:
    module = Classifier()
    torch.save({"state_dict": module.state_dict(), **entries}, path)
    return module


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
def test_nothing_in_a_file_is_run(name: str, old: bool, tmp_path: Path) -> None:
    module = Classifier()
    content = {"state_dict": module.state_dict(), "hyper_parameters": {"lr": 0.5, "bad": HOSTILE[name]()}}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not old)
    with pytest.warns(UserWarning, match=r"Left out of .*`hyper_parameters\.bad` \("):
        loaded = load_compressed(str(tmp_path / "a.ckpt"), Classifier())
    assert_same_state(module, loaded)
    assert not RAN.exists()


@left_out
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("place", ["state_dict", "lightning_compress"])
def test_in_the_weights_or_our_entry_it_is_refused(name: str, place: str, tmp_path: Path) -> None:
    content: dict[str, Any] = {"state_dict": dict(Classifier().state_dict()), "lightning_compress": {"version": 1}}
    content[place]["bad"] = HOSTILE[name]()
    torch.save(content, tmp_path / "a.ckpt")
    module = Classifier()
    before = snapshot(module)
    with pytest.raises(CompressionError, match=rf"without running code from the file.*`{place}\.bad` is of class"):
        load_compressed(str(tmp_path / "a.ckpt"), module)
    assert_same_state(before, snapshot(module))
    assert not RAN.exists()


def forge(path: Path, program: bytes) -> None:
    """A file of torch whose pickle is written by hand."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/version", "3\n")


SYSTEM = f"S'{TOUCH}'\n".encode()
FUNCTION = b"ctorch._utils\n_rebuild_tensor_v2\n"
PROGRAMS = {
    "INST": b"(" + SYSTEM + b"ios\nsystem\n.",
    "OBJ": b"(cos\nsystem\n" + SYSTEM + b"o.",
    "NEWOBJ": b"\x80\x02csubprocess\nPopen\n(" + SYSTEM + b"t\x81.",
    "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n(" + SYSTEM + b"t}\x92.",
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93" + SYSTEM + b"\x85R.",
    "a dotted name of what is known": b"\x80\x04\x8c\x05torch\x8c\x0bTensor.apply\x93" + SYSTEM + b"\x85R.",
    "a class's attribute": b"\x80\x02ctorch\nTensor\n(N}X\x06\x00\x00\x00hackedI1\nstb.",
    "a function's attribute": b"\x80\x02" + FUNCTION + b"(N}X\x06\x00\x00\x00hackedI1\nstb.",
    "a function's dict": b"\x80\x02" + FUNCTION + b"}X\x06\x00\x00\x00hackedI1\nsb.",
    "an unknown class's attribute": b"\x80\x02cos\nsystem\n(N}X\x04\x00\x00\x00kindI1\nstb.",
    "a storage's attribute": b"\x80\x02ctorch.storage\nUntypedStorage\n(N}X\x06\x00\x00\x00hackedI1\nstb.",
}


@left_out
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_opcode_leads_out(name: str, tmp_path: Path) -> None:
    forge(tmp_path / "a.ckpt", PROGRAMS[name])
    with pytest.raises(CompressionError, match="`path` must"):
        load_compressed(str(tmp_path / "a.ckpt"), Classifier())
    assert not RAN.exists()
    known = (torch.Tensor, torch.UntypedStorage, torch._utils._rebuild_tensor_v2)
    assert not any(hasattr(value, "hacked") for value in known)


def test_the_hostile_files_would_run_code() -> None:
    # The guard of the tests above: a plain unpickler runs these.
    for data in (pickle.dumps(HOSTILE["os.system"]()), pickle.dumps(SetsState()), PROGRAMS["INST"], PROGRAMS["OBJ"]):
        pickle.loads(data)
        assert RAN.exists()
        RAN.unlink()


def test_weights_are_read_whatever_else_stands_there(tmp_path: Path) -> None:
    tensors = {
        "float": torch.randn(3),
        "bfloat16": torch.randn(3).bfloat16(),
        "unsigned": torch.ones(3, dtype=torch.uint16),
        "eight bits": torch.ones(3).to(torch.float8_e4m3fn),
        "parameter": nn.Parameter(torch.randn(2)),
        "view": torch.randn(4, 4).t()[1:],
    }
    plain = {"size": torch.Size([1]), "dtype": torch.float16, "set": {1}, "bytes": b"ab", "count": Counter("aab")}
    torch.save({"state_dict": OrderedDict(tensors), **plain, "others": HARMLESS}, tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"`others\.a network` \(torch\.nn\.modules\.linear\.Linear\)") as caught:
        content, gone = read_inert(str(tmp_path / "a.ckpt"), "load_compressed")
    assert len(caught) == 1 and "and 4 more" in str(caught[0].message)
    assert gone.keys() == {f"others.{name}" for name in HARMLESS}
    assert content.pop("others") == {}
    assert_same_state(tensors, content.pop("state_dict"))
    assert content == plain


@left_out
def test_a_cycle_ends(tmp_path: Path) -> None:
    circle: dict[str, Any] = {"net": nn.Linear(1, 1)}
    circle["again"] = [circle]
    module = saved(tmp_path / "a.ckpt", circle=circle)
    assert_same_state(module, load_compressed(str(tmp_path / "a.ckpt"), Classifier()))


@left_out
def test_the_state_of_our_callbacks_comes_back_beside_that_of_others(tmp_path: Path) -> None:
    trainer = quiet_trainer(max_epochs=2, callbacks=[ScheduledPruning(sparsity=0.6)])
    module = Classifier()
    trainer.fit(module, TinyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    content["callbacks"]["Theirs"] = {"best": np.float64(1.0), "net": nn.Linear(1, 1)}
    content["optimizer_states"][0]["odd"] = Path("a")
    torch.save(content, tmp_path / "b.ckpt")
    pruning = ScheduledPruning(sparsity=0.6)
    loaded = load_compressed(str(tmp_path / "b.ckpt"), Classifier())
    quiet_trainer(max_epochs=0, callbacks=[pruning]).fit(loaded, TinyData())
    assert pruning.masks and all(int((mask == 0).sum()) for mask in pruning.masks.values())
    assert_same_state(module, loaded)


@left_out
def test_a_users_own_hook_gets_what_could_be_read(tmp_path: Path) -> None:
    class WithHook(Classifier):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.seen = checkpoint["hyper_parameters"]

    saved(tmp_path / "a.ckpt", hyper_parameters={"lr": 0.5, "net": nn.Linear(1, 1)})
    assert load_compressed(str(tmp_path / "a.ckpt"), WithHook()).seen == {"lr": 0.5}


@left_out
def test_a_pickled_module_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(Classifier(), tmp_path / "a.ckpt")
    with pytest.raises(CompressionError, match=r"`its content` is of class tests\.support\.modules\.Classifier\. Save"):
        load_compressed(str(tmp_path / "a.ckpt"), Classifier())


@left_out
def test_a_teacher_is_found_beside_such_hyperparameters(tmp_path: Path) -> None:
    module = saved(tmp_path / "a.ckpt", hyper_parameters={"bad": HOSTILE["os.system"](), "net": nn.Linear(1, 1)})
    teacher = Classifier()
    load_weights_(teacher, str(tmp_path / "a.ckpt"))
    assert_same_state(module, teacher)
    assert not RAN.exists()
