"""Runs the cases under pytest: one line for a vendor, one table at the end for the reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from transload.errors import NoBackend
from transload.hal import Backend, BrokenBackend, Device, Kernel, backends
from transload.testing.cases import CASES, Case
from transload.testing.run import run_case

if TYPE_CHECKING:
    import pytest

Test = Callable[["pytest.FixtureRequest", "_Run"], None]


class _Run:
    """One parameter of the test: a case and the kernel that takes it, or the reasons why none does."""

    def __init__(self, case: Case, kernel: Kernel | None, reasons: str) -> None:
        self.case, self.kernel, self.reasons = case, kernel, reasons

    @property
    def id(self) -> str:
        return f"{self.kernel.name if self.kernel else 'none'}-{self.case.id}"


def backend_tests(backend: str | Backend, device: Device | None = None, cases: Sequence[Case] = CASES) -> Test:
    """A parametrized pytest function that runs every case on every kernel of a backend that takes it.

    backend: its name, or the object. device: asked instead of a real one where this machine has none (a laptop without
    the card): then packing is tested and the multiplication is left out. Without one and without a device, every case
    is skipped with the backend's reason.

        test_conformance = backend_tests("acme")
    """
    import pytest

    chosen = _found(backend)
    missing = chosen.unavailable()
    real = None if missing else next(iter(chosen.devices()), None)
    asked = real or device
    runs = [] if asked is None else list(_runs(chosen, asked, cases))
    layout_only = real is None

    def test(request: pytest.FixtureRequest, run: _Run) -> None:
        if run.kernel is None or asked is None:
            pytest.skip(f"not supported: {run.reasons}")
        result = run_case(chosen, asked, run.kernel, run.case, layout_only)
        assert result.passed, f"{result.kernel}: {result.failed or result.refused}"

    def summarised(request: pytest.FixtureRequest, run: _Run) -> None:
        _Summary.of(request.config).add(chosen.name, asked, layout_only, missing, runs, len(cases), chosen.kernels)
        test(request, run)

    summarised.__doc__ = f"Conformance of backend '{chosen.name}'."
    nothing = [_Run(cases[0], None, f"no device: {missing or 'the backend lists none'}")] if asked is None else []
    return pytest.mark.parametrize("run", runs or nothing, ids=lambda run: run.id)(summarised)


def coverage(backend: str | Backend, device: Device | None = None, cases: Sequence[Case] = CASES) -> Mapping[str, int]:
    """How many cases each kernel takes: asserted by a backend's own tests, so that "all skipped" cannot pass."""
    chosen = _found(backend)
    asked = device or chosen.devices()[0]
    return {k.name: sum(k.refuses(case.problem, asked) is None for case in cases) for k in chosen.kernels}


def _found(backend: str | Backend) -> Backend:
    """The backend; one that is not installed or does not load is an error here, never a row of skipped tests."""
    if not isinstance(backend, str):
        return backend
    found = backends().get(backend)
    if found is None:
        raise NoBackend(f"no backend '{backend}' is installed; there are {', '.join(sorted(backends()))}")
    if isinstance(found, BrokenBackend):
        raise NoBackend(f"backend '{backend}': {found.unavailable()}")
    return found


def _runs(backend: Backend, device: Device, cases: Sequence[Case]) -> Iterator[_Run]:
    for case in cases:
        answers = [(kernel, kernel.refuses(case.problem, device)) for kernel in backend.kernels]
        takers = [kernel for kernel, reason in answers if reason is None]
        yield from (_Run(case, kernel, "") for kernel in takers)
        if not takers:
            reasons = "; ".join(f"{kernel.name}: {reason}" for kernel, reason in answers)
            yield _Run(case, None, reasons or "the backend has no kernels")


class _Summary:
    """A pytest plugin that prints, once a backend, how many cases were supported and why the others were not."""

    NAME = "transload-conformance"

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}

    @classmethod
    def of(cls, config: pytest.Config) -> _Summary:
        found = config.pluginmanager.get_plugin(cls.NAME)
        if not isinstance(found, cls):
            found = cls()
            config.pluginmanager.register(found, cls.NAME)
        return found

    def add(
        self,
        backend: str,
        device: Device | None,
        layout_only: bool,
        missing: str | None,
        runs: Sequence[_Run],
        total: int,
        kernels: Sequence[Kernel],
    ) -> None:
        if backend in self._lines:
            return
        if device is None:
            self._lines[backend] = [f"{backend}: no case run: {missing or 'the backend lists no device'}"]
            return
        unsupported = Counter(run.reasons for run in runs if run.kernel is None)
        taken = Counter(run.kernel.name for run in runs if run.kernel is not None)
        how = f"packing only, {missing}" if layout_only else device.model
        lines = [f"{backend} ({how}): {total - unsupported.total()} of {total} cases supported"]
        lines += [f"  {taken[kernel.name]:4} by {kernel.name}" for kernel in kernels]
        lines += [f"  {count:4} not supported: {reason}" for reason, count in unsupported.most_common()]
        self._lines[backend] = lines

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("conformance")
        for lines in self._lines.values():
            for line in lines:
                terminalreporter.write_line(line)
