"""Bringing written bytes to the disk while the next ones are made: fsync in a thread of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from transload.writer.journal import Journal


class Syncer:
    """Syncs files in the order given, then records in the journal what they hold. At most one batch waits."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="transload-sync")
        self._running: list[Future[None]] = []

    def start(self, descriptors: Sequence[int], names: Sequence[str]) -> None:
        """Begins to sync `names`, which are written; waits only while two earlier batches are still under way.

        Raises OSError when an earlier batch failed.
        """
        while len(self._running) > 1:
            self._running.pop(0).result()
        self._running.append(self._pool.submit(self._sync, tuple(descriptors), tuple(names)))

    def wait(self) -> None:
        """Returns when everything is on the disk and recorded. Raises OSError when it is not."""
        while self._running:
            self._running.pop(0).result()

    def close(self) -> None:
        """Ends the thread after what it is doing; files may be closed afterwards. Errors count for nothing here."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _sync(self, descriptors: Sequence[int], names: Sequence[str]) -> None:
        for descriptor in descriptors:
            os.fsync(descriptor)
        self._journal.record(names)
