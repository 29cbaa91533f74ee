"""Runs that stop on the way, and go on when they are told to."""

from __future__ import annotations

import contextvars
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_compress.compensation.walks import MOST_THREADS, Walk, small_teams
from tests.support.oracles import same_random_state


def test_only_one_of_several_runs_at_a_time_and_in_the_order_in_which_they_are_called():
    log: list[str] = []

    def run(name: str) -> Any:
        def steps(walk: Walk) -> None:
            for number in range(3):
                log.append(f"{name}{number}")
                walk.stop(number)

        return Walk(steps)

    a, b = run("a"), run("b")
    assert [a.go_on(), b.go_on(), b.go_on(), a.go_on()] == [0, 0, 1, 1]
    assert log == ["a0", "b0", "b1", "a1"]
    a.end()
    b.end()


def test_an_error_of_the_run_is_raised_where_it_is_waited_for_and_the_run_is_over():
    def run(walk: Walk) -> None:
        walk.stop("first")
        raise LookupError("lost")

    walk = Walk(run)
    assert walk.go_on() == "first"
    with pytest.raises(LookupError, match="lost"):
        walk.go_on()
    assert walk.go_on() is None


def test_a_run_that_is_given_up_cleans_up_and_leaves_no_thread_though_it_catches_all_exceptions():
    before, cleaned = threading.active_count(), []

    def run(walk: Walk) -> None:
        while True:
            try:
                walk.stop("here")
            except Exception:
                cleaned.append("caught")
            finally:
                cleaned.append("cleaned")

    walk = Walk(run)
    walk.go_on()
    walk.end()
    walk.end()
    assert cleaned == ["cleaned"]
    assert threading.active_count() == before and walk.go_on() is None


def test_one_that_has_never_run_ends_without_a_thread():
    before = threading.active_count()
    Walk(lambda walk: walk.stop("here")).end()
    assert threading.active_count() == before


def test_a_stop_that_another_thread_calls_does_nothing():
    walk = Walk(lambda walk: walk.stop("own"))
    walk.stop("from outside")
    assert (walk.go_on(), walk.go_on()) == ("own", None)


def test_the_run_has_no_gradients_and_no_inference_mode_and_the_context_of_its_maker():
    setting, seen = contextvars.ContextVar("setting", default=0), []

    def run(walk: Walk) -> None:
        seen.extend([torch.is_grad_enabled(), torch.is_inference_mode_enabled(), setting.get()])

    setting.set(3)
    with torch.inference_mode():
        Walk(run).go_on()
    assert seen == [False, False, 3]


def test_many_walks_share_few_threads_and_the_number_outside_stays_what_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    seen: list[int] = []

    def run(walk: Walk) -> None:
        torch.ones(300, 300) @ torch.ones(300, 300)
        seen.append(torch.get_num_threads())

    try:
        for walks in (2, 64, 10_000):
            with small_teams(walks):
                Walk(run).go_on()
            assert torch.get_num_threads() == 6
        assert seen == [6, MOST_THREADS // 64, 1]
    finally:
        torch.set_num_threads(before)


def test_what_belongs_to_the_process_is_each_runs_own_and_outside_as_it_was():
    seen: list[Any] = []

    def run(dtype: torch.dtype) -> Any:
        def steps(walk: Walk) -> None:
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                with sdpa_kernel(SDPBackend.MATH):
                    walk.stop("inside")
                    seen.append((torch.get_default_dtype(), torch.backends.cuda.flash_sdp_enabled()))
            finally:
                torch.set_default_dtype(before)

        return Walk(steps)

    flags = torch.get_default_dtype(), torch.backends.cuda.flash_sdp_enabled()
    first, second, given_up = run(torch.float64), run(torch.bfloat16), run(torch.float16)
    for walk in (first, second, given_up, first, second):
        walk.go_on()
        assert (torch.get_default_dtype(), torch.backends.cuda.flash_sdp_enabled()) == flags
    given_up.end()
    assert (torch.get_default_dtype(), torch.backends.cuda.flash_sdp_enabled()) == flags
    assert seen == [(torch.float64, False), (torch.bfloat16, False)]


def test_runs_that_begin_alike_draw_alike_and_nothing_is_drawn_outside():
    drawn: dict[str, list[Any]] = {"a": [], "b": []}

    def run(name: str) -> Walk:
        def steps(walk: Walk) -> None:
            for _ in range(3):
                drawn[name].append((torch.rand(()).item(), np.random.random(), random.random()))
                walk.stop("drawn")

        return Walk(steps)

    with same_random_state():
        a, b = run("a"), run("b")
        for walk in (a, b, b, a, b, a):
            walk.go_on()
        a.end()
        b.end()
    assert drawn["a"] == drawn["b"] and len(set(drawn["a"])) == 3


def test_nothing_is_compiled_by_runs_side_by_side_and_what_is_compiled_afterwards_is():
    calls: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append("compiled")
        return graph.forward

    compiled = torch.compile(lambda x: x + 1, backend=backend)

    def run(walk: Walk) -> None:
        compiled(torch.ones(2))
        walk.stop("here")
        compiled(torch.ones(2))

    first, second = Walk(run), Walk(run)
    with small_teams(2):
        for walk in (first, second, first, second):
            walk.go_on()
    assert calls == []
    compiled(torch.ones(2))
    assert calls == ["compiled"]
