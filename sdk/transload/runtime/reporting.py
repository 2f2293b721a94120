"""What really runs: the kernel and precision of every quantized module of a model, and why anything differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from transload.runtime.decoding import decoder_of
from transload.runtime.embedding import QuantEmbedding, RowStore
from transload.runtime.experts import QuantExperts
from transload.runtime.linear import QuantLinear
from transload.runtime.weight import PackedWeight, SplitWeight


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One quantized weight. requested and executed are schemes (W4A16, W4A8); nbytes is what it occupies here.

    passed_over: kernels that were asked first, with their refusals. notes: sentences about anything that differs from
    the request.
    """

    name: str
    kind: str  # linear, experts, embedding
    spec: str
    kernel: str
    device: str
    requested: str
    executed: str
    nbytes: int
    passed_over: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """All quantized modules, the modules kept in float with the reason, and the bytes of all float tensors.

    unused: quantized modules of the checkpoint that the model has no place for (layers for speculative decoding, say).
    packed_cache: what became of packed_cache, a sentence, where it was asked for.
    decoder: what runs one sequence: a kernel with one call a token or prompt, or transformers' layers and why.
    """

    modules: tuple[ModuleReport, ...]
    kept: dict[str, str]
    float_bytes: int
    unused: tuple[str, ...] = ()
    packed_cache: str = ""
    decoder: str = ""

    @property
    def quantized_bytes(self) -> int:
        """Bytes of all packed weights; tied ones count once."""
        return sum(m.nbytes for m in self.modules)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        groups = Counter((m.kind, m.spec, m.kernel, m.requested, m.executed) for m in self.modules)
        for (kind, spec, kernel, requested, executed), count in groups.most_common():
            differs = "" if requested == executed else f" (asked for {requested})"
            yield f"{count:5} x {kind}, {spec}: kernel {kernel}, runs {executed}{differs}"
        yield f"quantized {_mb(self.quantized_bytes)}, float {_mb(self.float_bytes)}"
        if self.packed_cache:
            yield self.packed_cache
        if self.decoder:
            yield f"decoder: {self.decoder}"
        for reason, count in Counter(self.kept.values()).most_common():
            yield f"{count:5} x kept in float: {reason}"
        if self.unused:
            yield f"{len(self.unused):5} x stored, but the model has no place for it, such as {self.unused[0]}"
        for note, count in Counter(n for m in self.modules for n in m.notes).most_common():
            yield f"{count:5} x {note}"


def report(model: nn.Module) -> Report:
    """What runs in a model that Transload loaded; for any other model nothing is quantized.

    >>> print(report(nn.Linear(2, 2)))
    quantized 0.0 MB, float 0.0 MB
    """
    quantizer = getattr(model, "hf_quantizer", None)
    notes: dict[str, str] = getattr(quantizer, "notes", {})
    seen: set[int] = set()
    modules, inner = [], set()
    for name, module in model.named_modules():
        for kind, packed in _weights(module):  # several of one module where its rows are of several schemes
            inner |= {id(t) for t in packed.buffers()}
            modules.append(_describe(name, kind, packed, notes.get(name), counted=id(packed) in seen))
            seen.add(id(packed))
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers()) if id(t) not in inner}
    unused = tuple(getattr(quantizer, "unused", ()))
    cache = getattr(quantizer, "cache_outcome", "")
    return Report(
        tuple(modules), dict(getattr(quantizer, "kept", {})), sum(tensors.values()), unused, cache, decoder_of(model)
    )


def _weights(module: nn.Module) -> Iterator[tuple[str, PackedWeight | RowStore]]:
    if isinstance(module, QuantLinear) and module.packed is not None:
        yield from (("linear", part) for part in _parts(module.packed))
    elif isinstance(module, QuantEmbedding) and module.table is not None:
        yield from (("embedding", part) for part in _parts(module.table))
    elif isinstance(module, QuantExperts) and module.gate_up is not None and module.down is not None:
        yield from (("experts", part) for part in (*_parts(module.gate_up), *_parts(module.down)))


def _parts(weight: PackedWeight | SplitWeight | RowStore) -> list[PackedWeight | RowStore]:
    return list(weight.packed_parts()) if isinstance(weight, SplitWeight) else [weight]


def _describe(name: str, kind: str, w: PackedWeight | RowStore, note: str | None, counted: bool) -> ModuleReport:
    notes = (note,) if note else ()
    nbytes = 0 if counted else sum(t.nbytes for t in w.buffers())
    device = str(next(w.buffers()).device).replace("meta", "disk")
    if isinstance(w, RowStore) or kind == "embedding":
        scheme = f"W{w.spec.bits}"
        spec = str(w.spec.weights_only())
        return ModuleReport(name, kind, spec, "row lookup", device, scheme, scheme, nbytes, (), notes)
    return ModuleReport(
        name, kind, str(w.spec), w.kernel.name, device, w.requested, w.executed, nbytes, w.passed_over, notes + w.notes
    )


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
