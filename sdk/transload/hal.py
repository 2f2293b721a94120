"""The hardware-abstraction layer: what a vendor implements, and how a kernel is chosen.

A backend is found by the entry point group `transload.backends`: a fourth vendor installs a package and touches
nothing here. A refusal is a sentence: `refuses` returns None for yes, or the reason for no.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from transload.errors import NoBackend, NoKernel, Unsupported
from transload.quant import QTensor, QuantSpec

ENTRY_POINTS = "transload.backends"


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or the host. memory and free are bytes; free is what can be had now."""

    backend: str  # the backend's name: cpu, cuda, ascend
    index: int
    model: str  # "Intel(R) Xeon(R) Platinum 8481C", "NVIDIA H200", "Ascend910B2"
    arch: str  # "x86_64 avx512_vnni amx_int8", "sm_90", "910B"
    memory: int
    free: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything a kernel may look at before it says yes or no: y[M, N] = x[M, K] @ w[N, K].T."""

    n: int
    k: int
    spec: QuantSpec
    x_dtype: torch.dtype = torch.float32
    m: int | None = None  # rows of x where known
    experts: int | None = None

    def __str__(self) -> str:
        experts = f"{self.experts} experts of " if self.experts else ""
        return f"{self.spec.scheme} {self.spec} {experts}[N={self.n}, K={self.k}], x {self.x_dtype}"

    @classmethod
    def of(cls, w: QTensor, x_dtype: torch.dtype = torch.float32, m: int | None = None) -> Problem:
        """The problem that a weight poses."""
        return cls(w.n, w.k, w.spec, x_dtype, m, w.experts)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A weight in one kernel's own layout. `tensors` is all of it: moving them moves the weight."""

    kernel: str
    spec: QuantSpec
    n: int
    k: int
    tensors: Mapping[str, Tensor]
    experts: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weight occupies."""
        return sum(t.nbytes for t in self.tensors.values())


@dataclass(frozen=True, slots=True, eq=False)
class DecoderLinear:
    """A linear layer of a decoder: weights whose outputs follow each other, and their bias [N] or None.

    A part is packed, or a float tensor [N, K]; its own bias comes with it. Of experts all parts are stacks: packed with
    as many experts, or a float tensor [E, N, K].
    """

    parts: tuple[tuple[Packed | Tensor, Tensor | None], ...]


@dataclass(frozen=True, slots=True, eq=False)
class DecoderMlp:
    """down(silu(gate(x)) * up(x)). gate_up: the gate's outputs before the up's."""

    gate_up: DecoderLinear
    down: DecoderLinear


@dataclass(frozen=True, slots=True, eq=False)
class DecoderExperts:
    """A mixture of experts: each[e](x) of the top_k experts that the router chooses, times their weights, added up.

    router: logits [E] of x. scores are the logits' softmax, or sigmoids of each. Chosen are the largest of
    scores + bias (float32 [E]) among the top_groups groups of neighbours whose two largest add up to most; an expert's
    weight is its score, divided by the sum of the chosen scores when normalized, times scaling.
    shared_gate: one output; the MLP beside the experts counts sigmoid(shared_gate(x)) times. None: once.
    """

    router: DecoderLinear
    each: DecoderMlp
    top_k: int
    sigmoid: bool = False
    bias: Tensor | None = None
    groups: int = 1
    top_groups: int = 1
    normalized: bool = True
    scaling: float = 1.0
    shared_gate: DecoderLinear | None = None


@dataclass(frozen=True, slots=True, eq=False)
class DecoderLayer:
    """x += after(out(attention(qkv(norm(x))))), then x += after(mlp(norm(x)) + experts(norm(x))).

    qkv: outputs of the queries, then keys, then values. Norms are weights of root-mean-square norms, of a whole vector
    or, for q and k, of one head; None where the model has none.
    mlp: also what all tokens share beside experts; it or the experts may be None. window: tokens that a token sees,
    itself among them; None for all.
    """

    attention_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    after_attention: Tensor | None
    mlp_norm: Tensor
    after_mlp: Tensor | None
    qkv: DecoderLinear
    out: DecoderLinear
    mlp: DecoderMlp | None
    experts: DecoderExperts | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """The layers of a decoder with grouped-query attention and rotary positions, and the norm behind them.

    rotary: leading values of a head that are turned, in pairs (i, i + rotary / 2), or neighbours when interleaved.
    """

    layers: tuple[DecoderLayer, ...]
    norm: Tensor
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    interleaved: bool
    eps: float
    scaling: float


class DecoderStep(ABC):
    """Tokens of one sequence through all layers of a decoder, in one call."""

    @abstractmethod
    def bind(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> object:
        """The cache of a sequence as `run` takes it: a tensor [kv_heads, capacity, head_dim] for every layer."""

    @abstractmethod
    def run(self, x: Tensor, cos: Tensor, sin: Tensor, cache: object, length: int) -> Tensor:
        """The hidden state [hidden] behind the last norm. x [hidden]; cos, sin [rotary / 2] of its position; float32.

        length: tokens that the cache holds; the key and value of this token are written behind them.
        """

    @abstractmethod
    def run_many(self, x: Tensor, cos: Tensor, sin: Tensor, cache: object, length: int) -> Tensor:
        """`run` for T tokens that follow each other, each seeing those up to itself: [T, hidden].

        x [T, hidden]; cos, sin [T, rotary / 2]. The cache has room for length + T tokens.
        """


class Kernel(ABC):
    """One way to multiply with quantized weights."""

    name: ClassVar[str]

    # Names the layout of `pack` and its version where it depends on nothing but the weight (activations and device
    # leave it as it is) and `place` keeps it in host memory: such tensors may be written to a file and mapped by a
    # later process, also for another kernel of the same layout. None: packed anew by every process.
    layout: ClassVar[str | None] = None

    # Dtypes of float weights that `float_product` multiplies as they are.
    float_dtypes: ClassVar[tuple[torch.dtype, ...]] = ()

    @abstractmethod
    def refuses(self, p: Problem, device: Device) -> str | None:
        """None when the kernel computes `p` on `device` exactly as requested; otherwise the reason, a sentence."""

    @abstractmethod
    def pack(self, w: QTensor) -> Packed:
        """The kernel's layout of a weight; pure, on the host, no device needed."""

    @abstractmethod
    def unpack(self, p: Packed) -> QTensor:
        """The exact inverse of `pack`."""

    def verify(self, p: Packed) -> None:
        """Raises FormatError when tensors from a file cannot be what `pack` makes for p's scheme and sizes.

        Overridden by every kernel with a `layout`; reading such tensors afterwards must be safe whatever they hold.
        """
        raise Unsupported(f"kernel '{self.name}' takes no packed weights from files")

    def place(self, p: Packed, device: torch.device) -> Packed:
        """`p` where `matmul` reads it. Override where a device keeps weights in a form that only it can make."""
        return replace(p, tensors={name: t.to(device) for name, t in p.tensors.items()})

    @abstractmethod
    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        """x [M, K] times w.T plus bias [N]: [M, N] in x's dtype. M = 0 is allowed."""

    def grouped_matmul(self, x: Tensor, w: Packed, counts: Tensor, bias: Tensor | None = None) -> Tensor:
        """Rows sorted by expert, counts int64 [E] rows each: [M, N]. Optional; a kernel without it refuses experts."""
        raise Unsupported(f"kernel '{self.name}' has no grouped matmul")

    def swiglu_experts(self, x: Tensor, gate_up: Packed, down: Packed, counts: Tensor) -> Tensor | None:
        """(silu(x @ gate.T) * (x @ up.T)) @ down.T expert by expert, [M, N] in x's dtype, where a device fuses it.

        gate_up holds the gate's rows before the up's. None: not fused here; do it in three steps.
        """
        return None

    def decoder(self, d: Decoder) -> DecoderStep | str:
        """A way to run a whole decoder token by token that beats module after module, or why there is none."""
        return f"kernel '{self.name}' multiplies one weight at a time"

    def float_product(self, x: Tensor, w: Tensor) -> Tensor:
        """Few rows x float32 [M, K] times a float weight [N, K] of float_dtypes, as it is: float32 [M, N]. Optional."""
        raise Unsupported(f"kernel '{self.name}' multiplies quantized weights only")

    def rows(self, p: Packed, index: Tensor) -> QTensor:
        """Output rows `index` (int64 [R]) of a packed linear: the lookup of an embedding tied to the output head.

        Optional; without it such an embedding is kept a second time. The rows are as `unpack` would give them.
        """
        raise Unsupported(f"kernel '{self.name}' cannot look up rows")

    def executed(self, p: Problem) -> str:
        """The scheme that really runs (W4A16, W4A8). Override where it differs from the request."""
        return p.spec.scheme


@dataclass(frozen=True, slots=True)
class Serving:
    """What serves models on this vendor's hardware: data for `plan`, `launch` and `serve`."""

    engine: str | None = None  # "vllm", "vllm-ascend"
    visible_devices: str | None = None  # the environment variable that selects devices
    formats: tuple[str, ...] = ()  # checkpoint formats that the engine loads


@runtime_checkable
class Backend(Protocol):
    """One vendor. Importing a backend's package must not import the vendor's library."""

    name: str
    kernels: Sequence[Kernel]  # in order of preference
    serving: Serving

    def unavailable(self) -> str | None:
        """None when this machine can run it; otherwise what is missing and how to get it."""

    def devices(self) -> Sequence[Device]:
        """The devices of this machine, empty when unavailable."""

    def torch_device(self, device: Device) -> torch.device:
        """Where tensors of `device` live in torch."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A kernel and why the ones before it were passed over."""

    kernel: Kernel
    device: Device
    passed_over: tuple[tuple[str, str], ...] = field(default=())


def choose(backend: Backend, problem: Problem, device: Device) -> Choice:
    """The first kernel of `backend` that does not refuse `problem`.

    Raises NoKernel listing every refusal.
    """
    refusals: list[tuple[str, str]] = []
    for kernel in backend.kernels:
        reason = kernel.refuses(problem, device)
        if reason is None:
            return Choice(kernel, device, tuple(refusals))
        refusals.append((kernel.name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals) or "it has no kernels"
    raise NoKernel(f"no kernel of backend '{backend.name}' takes {problem}: {reasons}")


@cache
def backends() -> Mapping[str, Backend]:
    """Every installed backend by name, available or not. One that fails to load is there and says so."""
    return {point.name: _load(point) for point in entry_points(group=ENTRY_POINTS)}


def _load(point: EntryPoint) -> Backend:
    try:
        backend = point.load()
    except Exception as e:  # a stranger's package may fail in any way; it must not take the others down
        return BrokenBackend(point.name, f"its package {point.value} failed to load: {type(e).__name__}: {e}")
    if not isinstance(backend, Backend):
        return BrokenBackend(point.name, f"{point.value} is not a transload.hal.Backend")
    return backend


@dataclass(slots=True)
class BrokenBackend:
    """Stands in for an installed backend that cannot be loaded."""

    name: str
    reason: str
    kernels: Sequence[Kernel] = ()
    serving: Serving = Serving()

    def unavailable(self) -> str:
        """Why it cannot be loaded."""
        return self.reason

    def devices(self) -> Sequence[Device]:
        """None."""
        return ()

    def torch_device(self, device: Device) -> torch.device:
        """Never called: there are no devices."""
        raise NoBackend(f"backend '{self.name}': {self.reason}")


def find_device(name: str = "auto") -> tuple[Backend, Device]:
    """The backend and device of a name: "auto", a backend ("cpu"), or one of its devices ("cuda:1", "npu:0").

    auto takes the first available accelerator, else the CPU. Raises NoBackend with the reason of every backend.
    """
    kind, _, index = name.partition(":")
    kind = {"npu": "ascend"}.get(kind, kind)
    known = backends()
    if kind == "auto":
        candidates = sorted(known.values(), key=lambda b: b.name == "cpu")
    elif kind in known:
        candidates = [known[kind]]
    else:
        raise NoBackend(f"device '{name}': no backend '{kind}' is installed; there are {', '.join(sorted(known))}")
    if index and not index.isdigit():
        raise NoBackend(f"device '{name}': '{index}' is not a device number")
    reasons = []
    for backend in candidates:
        reason, devices = backend.unavailable(), backend.devices()
        if reason is None and int(index or 0) < len(devices):
            return backend, devices[int(index or 0)]
        reasons.append(f"{backend.name}: {reason or f'it has {len(devices)} devices'}")
    raise NoBackend(f"device '{name}' cannot be used: " + "; ".join(reasons))
