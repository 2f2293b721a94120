"""Reading, transforming and writing at the same time, with a bound on the bytes that are in flight.

One thread reads and decodes ahead, the caller's thread transforms, one thread writes behind. Torch, files and hashes
release the interpreter, so the three overlap. Errors of either thread come out in the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class Budget:
    """Bytes that may be in flight. Something larger than the limit waits until it is alone, then passes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._open = limit, 0, True
        self._changed = Condition()

    def acquire(self, size: int) -> bool:
        """Waits until `size` bytes fit. False when the budget was closed meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open or not self._used or self._used + size <= self._limit)
            self._used += size
            return self._open

    def release(self, size: int) -> None:
        """Gives bytes back."""
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def close(self) -> None:
        """Wakes everyone; nothing is granted any more."""
        with self._changed:
            self._open = False
            self._changed.notify_all()


class Ahead(Generic[T]):
    """Runs an iterator in a thread, as far ahead as the budget allows. Use it in a `with` block."""

    def __init__(self, items: Iterator[T], budget: Budget) -> None:
        self._items, self._budget = items, budget
        self._ready: SimpleQueue[tuple[bool, T | BaseException | None]] = SimpleQueue()
        self._thread = Thread(target=self._run, name="transload-reader", daemon=True)

    def __enter__(self) -> Iterator[T]:
        self._thread.start()
        return self._received()

    def __exit__(self, *error: object) -> None:
        self._budget.close()
        self._thread.join()

    def _received(self) -> Iterator[T]:
        while True:
            good, value = self._ready.get()
            if isinstance(value, BaseException):
                raise value
            if not good:
                return
            yield value  # type: ignore[misc]

    def _run(self) -> None:
        try:
            for item in self._items:
                self._ready.put((True, item))
            self._ready.put((False, None))
        except BaseException as e:
            self._ready.put((False, e))


class Behind:
    """Runs jobs in order in one thread. Use it in a `with` block; leaving it waits, and raises the first error.

    failed: called once, in the thread, when a job raises; the jobs after it are not run.
    """

    def __init__(self, failed: Callable[[], None]) -> None:
        self._on_failure = failed
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="transload-writer")
        self._failed: BaseException | None = None

    def __enter__(self) -> Behind:
        return self

    def submit(self, job: Callable[[], None]) -> None:
        """Queues a job. Raises what an earlier job raised."""
        if self._failed is not None:
            raise self._failed
        self._pool.submit(self._guarded, job)

    def __exit__(self, kind: object, *rest: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None and self._failed is not None:
            raise self._failed

    def _guarded(self, job: Callable[[], None]) -> None:
        if self._failed is None:
            try:
                job()
            except BaseException as e:
                self._failed = e
                self._on_failure()
