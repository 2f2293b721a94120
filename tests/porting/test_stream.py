"""The three threads of a port: order, bounds, and errors that come out where the caller sees them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from transload.porting.stream import Ahead, Behind, Budget


def test_items_come_in_order_and_never_more_than_the_budget() -> None:
    budget, running, most = Budget(10), 0, 0
    lock = threading.Lock()

    def items() -> Iterator[int]:
        nonlocal running, most
        for i in range(50):
            if not budget.acquire(4):
                return
            with lock:
                running += 1
                most = max(most, running)
            yield i

    with Ahead(items(), budget) as received:
        for i, item in enumerate(received):
            assert item == i
            with lock:
                running -= 1
            budget.release(4)
    assert i == 49
    assert most <= 2


def test_something_larger_than_the_budget_passes_alone() -> None:
    budget = Budget(10)
    assert budget.acquire(100)
    budget.release(100)
    assert budget.acquire(3)


def test_an_error_while_reading_comes_out_in_the_caller() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken file")

    with pytest.raises(ValueError, match="broken file"), Ahead(items(), Budget(1)) as received:
        list(received)


def test_leaving_early_stops_the_reader() -> None:
    budget = Budget(1)

    def items() -> Iterator[int]:
        while budget.acquire(1):
            yield 1

    with Ahead(items(), budget) as received:
        next(received)
    assert not any(t.name == "transload-reader" for t in threading.enumerate())


def test_an_error_while_writing_stops_everything_and_is_raised() -> None:
    budget, done = Budget(1), []

    def items() -> Iterator[int]:
        for i in range(100):
            if not budget.acquire(1):
                return
            yield i

    def write(i: int) -> None:
        if i == 3:
            raise OSError("disk full")
        done.append(i)
        budget.release(1)

    with pytest.raises(OSError, match="disk full"):
        run(budget, items(), write)
    assert done == [0, 1, 2]


def run(budget: Budget, items: Iterator[int], write: Callable[[int], None]) -> None:
    with Behind(budget.close) as behind, Ahead(items, budget) as received:
        for i in received:
            behind.submit(partial(write, i))
