"""What the conformance cases do not ask of the native kernels: exact sums, odd shapes, threads, hostile bytes."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from transload import reference
from transload.errors import BackendError, ConfigError, Unsupported
from transload.hal import Device, Problem
from transload.quant import PER_CHANNEL, ActSpec, Grid, QTensor, QuantSpec, Zero
from transload_cpu import build_native, native_layout, native_library
from transload_cpu.native_kernel import NATIVE_KERNELS, NativeKernel, NativePortable

if native_library.unavailable():
    pytest.skip(str(native_library.unavailable()), allow_module_level=True)

HOST = Device("cpu", 0, "host", "x86_64", 0, 0)
KERNELS = [k for k in (*NATIVE_KERNELS, NativePortable()) if native_library.supported(k.isa)]
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
FP16, FP32, BF16 = torch.float16, torch.float32, torch.bfloat16


def random_weight(spec: QuantSpec, n: int, k: int, seed: int = 0, experts: int | None = None) -> QTensor:
    random = torch.Generator().manual_seed(seed)
    shape = (n, k) if experts is None else (experts, n, k)
    return reference.quantize_rtn(torch.randn(shape, generator=random), spec)


def nmse(y: torch.Tensor, truth: torch.Tensor) -> float:
    return float(((y.double() - truth.double()) ** 2).sum() / (truth.double() ** 2).sum().clamp(min=1e-30))


@each_kernel
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("zero", [Zero.MIDPOINT, Zero.CODES], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, 128, PER_CHANNEL])
def test_integer_sums_equal_the_reference_bit_for_bit(kernel: NativeKernel, bits: int, zero: Zero, group: int) -> None:
    """Scales of 1 leave nothing but integer sums, and activations whose largest is 127 quantize to themselves."""
    n, k, m = 37, 512, 13
    random = torch.Generator().manual_seed(bits)
    spec = QuantSpec(bits, group, zero=zero, act=ActSpec(8, group))
    codes = torch.randint(1 << bits, (n, k), generator=random, dtype=torch.uint8)
    side = (n, spec.groups(k))
    zeros = torch.randint(1 << bits, side, generator=random, dtype=torch.uint8) if zero is Zero.CODES else None
    w = QTensor(spec, codes, torch.ones(side), zeros)
    x = torch.randint(-127, 128, (m, k), generator=random).float()
    x[:, ::32] = 127
    points = torch.full(side, 1 << (bits - 1)) if zeros is None else zeros
    exact = x.double() @ (codes.double() - points.double().repeat_interleave(k // side[1], 1)).T
    assert torch.equal(kernel.matmul(x, kernel.pack(w)).double(), exact)
    assert torch.equal(reference.matmul(x, w).double(), exact)


@each_kernel
def test_random_shapes_match_the_reference(kernel: NativeKernel) -> None:
    """Shapes, groups, zeros and row counts drawn at random: one seed, so that a failure repeats."""
    random = torch.Generator().manual_seed(7)

    def draw(*choices: object) -> object:
        return choices[int(torch.randint(len(choices), (1,), generator=random))]

    for seed in range(60):
        act = draw(None, ActSpec(8), ActSpec(8, 32), ActSpec(8, 128))
        group = draw(8, 16, 32, 48, 64, 128, 256, PER_CHANNEL)
        zero = draw(Zero.MIDPOINT, Zero.CODES, Zero.FLOATS, Zero.MINS)
        spec = QuantSpec(draw(2, 3, 4, 5, 6, 8), group, zero=zero, scale_dtype=draw(FP16, BF16, FP32), act=act)
        n, k, m = (int(torch.randint(1, top, (1,), generator=random)) for top in (90, 700, 40))
        if kernel.refuses(Problem(n, k, spec), HOST):
            continue
        w = random_weight(spec, n, k, seed)
        packed = kernel.pack(w)
        assert kernel.unpack(packed).equal(w), spec
        x, bias = torch.randn(m, k, generator=random), torch.randn(n, generator=random)
        error = nmse(kernel.matmul(x, packed, bias), reference.matmul(x, w, bias))
        assert error < (1e-8 if act is None else 1e-11), f"{spec} {m}x{n}x{k}"


@each_kernel
def test_many_bfloat16_rows_match_the_reference(kernel: NativeKernel) -> None:
    """From some rows on, bfloat16 activations may take a kernel of their own."""
    random = torch.Generator().manual_seed(3)
    for seed, zero in enumerate(Zero):
        for group in (8, 32, 48, 128, PER_CHANNEL):
            if zero is Zero.NONE:
                continue
            k, n, m = (int(torch.randint(1, top, (1,), generator=random)) for top in (500, 90, 40))
            spec = QuantSpec(4 if group % 16 else 8, group, zero=zero, scale_dtype=FP16)
            w, x = random_weight(spec, n, k, seed), torch.randn(m + 96, k, generator=random).to(BF16)
            bias = torch.randn(n, generator=random)
            error = nmse(kernel.matmul(x, kernel.pack(w), bias), reference.matmul(x, w, bias))
            assert error < 1e-5, f"{spec} {m + 96}x{n}x{k}"


@each_kernel
@pytest.mark.parametrize("group", [8, 32, 128, PER_CHANNEL])
@pytest.mark.parametrize("m", [1, 12, 70])
def test_bfloat16_rows_are_multiplied_without_rounding_them(kernel: NativeKernel, m: int, group: int) -> None:
    """Whole numbers up to 127 fit every kernel's activations: the result is the exact sum, rounded to bfloat16 once."""
    random = torch.Generator().manual_seed(m)
    for bits, zero in (
        (4, Zero.MIDPOINT),
        (4, Zero.CODES),
        (8, Zero.CODES),
        (4, Zero.MINS),
        (5, Zero.MIDPOINT),
        (6, Zero.CODES),
    ):
        spec = QuantSpec(bits, group, zero=zero, scale_dtype=FP16)
        codes = torch.randint(1 << bits, (37, 328), generator=random, dtype=torch.uint8)
        side = (37, spec.groups(328))
        points = torch.randint(1 << bits, side, generator=random)
        given = {Zero.CODES: {"zeros": points.to(torch.uint8)}, Zero.MINS: {"mins": points.to(FP16)}}
        w = QTensor(spec, codes, torch.ones(side, dtype=FP16), **given.get(zero, {}))
        x = torch.randint(-127, 128, (m, 328), generator=random).to(BF16)
        x[:, ::8] = 127
        exact = (x.double() @ w.dequantize().double().T).float().to(BF16)
        assert torch.equal(kernel.matmul(x, kernel.pack(w)), exact), (bits, zero)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@each_kernel
@pytest.mark.parametrize("act", [None, ActSpec(8, 32)], ids=["W4A16", "W4A8"])
def test_rows_do_not_depend_on_their_neighbours(kernel: NativeKernel, act: ActSpec | None, bits: int) -> None:
    """Any number of rows, any cut into tiles and any number of threads give the same bits for the same row."""
    spec = QuantSpec(bits, 32, scale_dtype=FP16, act=act)
    packed = kernel.pack(random_weight(spec, 100, 256))
    x = torch.randn(70, 256)
    # AMX may sum few rows elsewhere than many; scaled in the same order, they still agree.
    alone = torch.cat([kernel.matmul(row, packed) for row in x.split(1)])
    threads = torch.get_num_threads()
    try:
        for count, m in ((1, 70), (2, 33), (2, 70), (5, 13)):
            torch.set_num_threads(count)
            assert torch.equal(kernel.matmul(x[:m], packed), alone[:m])
    finally:
        torch.set_num_threads(threads)


@each_kernel
def test_broken_rows_stay_visible_and_alone(kernel: NativeKernel) -> None:
    packed = kernel.pack(random_weight(QuantSpec(4, 32, act=ActSpec(8, 32)), 40, 128))
    x = torch.randn(20, 128)
    good = kernel.matmul(x, packed)
    x[3, 70], x[17, 0] = torch.nan, -torch.inf
    y = kernel.matmul(x, packed)
    assert bool(y[[3, 17]].isnan().all())
    rest = [i for i in range(20) if i not in (3, 17)]
    assert torch.equal(y[rest], good[rest])


@each_kernel
def test_views_of_x_are_read_in_place_or_copied(kernel: NativeKernel) -> None:
    packed = kernel.pack(random_weight(QuantSpec(4, 64, scale_dtype=BF16), 48, 192))
    big = torch.randn(9, 400).to(BF16)
    for view in (
        big[:, 100:292],
        big[::2, 7:199],
        big.T.contiguous().T[:, :192],
        big[:, :384:2],
        big[:1, :192].expand(4, 192),
    ):
        assert torch.equal(kernel.matmul(view, packed), kernel.matmul(view.contiguous().clone(), packed))


@each_kernel
def test_experts_in_one_call_equal_experts_one_by_one(kernel: NativeKernel) -> None:
    spec = QuantSpec(4, 32, zero=Zero.MINS, scale_dtype=FP16, act=ActSpec(8, 32))
    w = random_weight(spec, 40, 96, experts=5)
    counts = torch.tensor([3, 0, 40, 1, 0])
    x, bias = torch.randn(44, 96), torch.randn(5, 40)
    parts = x.split(counts.tolist())
    alone = [kernel.matmul(p, kernel.pack(w.expert(e)), bias[e]) for e, p in enumerate(parts)]
    y = kernel.grouped_matmul(x, kernel.pack(w), counts, bias)
    assert torch.allclose(y, torch.cat(alone), rtol=1e-6, atol=1e-6)
    assert kernel.grouped_matmul(x[:0], kernel.pack(w), counts * 0).shape == (0, 40)


def test_scales_that_underflow_half_precision_are_kept() -> None:
    """Subnormal and zero scales are stored as they are: packing never divides by them."""
    w = random_weight(QuantSpec(4, 32, scale_dtype=FP16), 16, 64)
    tiny = torch.tensor([0.0, 6e-8, -6e-8, 1e-5]).to(FP16).repeat(8).reshape(16, 2)
    w = replace(w, scales=tiny)
    x = torch.randn(3, 64)
    kernel = KERNELS[0]
    assert kernel.unpack(kernel.pack(w)).equal(w)
    assert nmse(kernel.matmul(x, kernel.pack(w)), reference.matmul(x, w)) < 1e-8


def test_python_threads_may_share_a_weight() -> None:
    kernel = KERNELS[0]
    packed = kernel.pack(random_weight(QuantSpec(4, 128, act=ActSpec(8, 128)), 200, 512))
    inputs = [torch.randn(m, 512) for m in (1, 7, 30, 2, 64, 13)] * 4
    expected = [kernel.matmul(x, packed) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: kernel.matmul(x, packed), inputs))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_one_layout_serves_every_instruction_set() -> None:
    spec = QuantSpec(4, 64, zero=Zero.CODES, scale_dtype=FP16)
    blobs = [k.pack(random_weight(spec, 33, 200)).tensors["packed"] for k in KERNELS]
    assert all(torch.equal(blob, blobs[0]) for blob in blobs)


@pytest.mark.parametrize("zero", [z for z in Zero if z is not Zero.NONE], ids=lambda z: z.value)
@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
def test_dequantized_weights_are_the_reference_rounded_once(bits: int, zero: Zero) -> None:
    """Bit for bit, for whole weights and for slabs that begin and end inside a panel, in every order of inputs."""
    random = torch.Generator().manual_seed(bits)
    for group, k, scales in ((8, 100, FP16), (32, 1, FP32), (32, 333, BF16), (48, 96, FP16), (PER_CHANNEL, 77, FP32)):
        for act_order in (False, True):
            w = random_weight(QuantSpec(bits, group, zero=zero, scale_dtype=scales), 75, k)
            if act_order:
                order = torch.randperm(k, generator=random)
                g_idx = w.group_of_k()[order].int()
                w = replace(w, spec=replace(w.spec, act_order=True), codes=w.codes[:, order].contiguous(), g_idx=g_idx)
            packed = KERNELS[0].pack(w)
            for dtype in (FP32, BF16, FP16):
                exact = w.dequantize().to(dtype)
                assert torch.equal(native_layout.dequantize(packed, dtype), exact), (w.spec, dtype)
                assert torch.equal(native_layout.dequantize(packed, dtype, 21, 33), exact[21:54]), (w.spec, dtype)


def test_dequantized_subnormals_infinities_and_experts() -> None:
    """Values that bfloat16 instructions would flush, and stacked experts as one row of outputs."""
    w = random_weight(QuantSpec(4, 32, scale_dtype=FP32), 40, 64, experts=3)
    w.scales[0, :9, 0] = torch.tensor([0.0, 1e-45, -1e-40, 9e-39, torch.inf, -torch.inf, 3e38, 1e-38, -0.0])
    packed = KERNELS[0].pack(w)
    for dtype in (FP32, BF16):
        exact, found = w.dequantize().to(dtype), native_layout.dequantize(packed, dtype)
        assert found.shape == (3, 40, 64)
        assert torch.equal(found.nan_to_num(7), exact.nan_to_num(7))
        assert torch.equal(native_layout.dequantize(packed, dtype, 70, 45), exact.flatten(0, 1)[70:115])
    with pytest.raises(ConfigError, match=r"outputs 100\.\.121 of 120"):
        native_layout.dequantize(packed, FP32, 100, 21)


HOSTILE_BYTES = {
    "empty": lambda b: b[:0],
    "header cut": lambda b: b[:100],
    "last byte missing": lambda b: b[:-1],
    "wrong magic": lambda b: torch.cat([b[:1] ^ 1, b[1:]]),
    "wrong version": lambda b: torch.cat([b[:8], b[8:9] ^ 7, b[9:]]),
    "enormous N": lambda b: torch.cat([b[:16], torch.full((8,), 255, dtype=torch.uint8) >> 1, b[24:]]),
    "group of 0": lambda b: torch.cat([b[:32], b[32:40] * 0, b[40:]]),
}


@pytest.mark.parametrize("damage", HOSTILE_BYTES.values(), ids=HOSTILE_BYTES.keys())
def test_damaged_packed_bytes_are_an_error(damage: object) -> None:
    kernel = KERNELS[0]
    packed = kernel.pack(random_weight(QuantSpec(4, 32), 40, 64))
    broken = replace(packed, tensors={"packed": damage(packed.tensors["packed"])})  # type: ignore[operator]
    with pytest.raises(ConfigError, match="truncated, damaged, or of another version"):
        kernel.matmul(torch.randn(2, 64), broken)


WRONG_CALLS = {
    "narrow x": (lambda k, p: k.matmul(torch.randn(2, 63), p), r"expected .* \[M, 64\]"),
    "x of one dimension": (lambda k, p: k.matmul(torch.randn(64), p), r"\[M, 64\]"),
    "integer x": (lambda k, p: k.matmul(torch.ones(2, 64, dtype=torch.int32), p), "torch.int32"),
    "short bias": (lambda k, p: k.matmul(torch.randn(2, 64), p, torch.zeros(39)), r"expected \(40,\)"),
    "counts for a plain linear": (
        lambda k, p: k.grouped_matmul(torch.randn(2, 64), p, torch.tensor([2])),
        "counts",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS.keys())
def test_wrong_arguments_are_named(call: object, message: str) -> None:
    kernel = KERNELS[0]
    with pytest.raises(ConfigError, match=message):
        call(kernel, kernel.pack(random_weight(QuantSpec(4, 32), 40, 64)))  # type: ignore[operator]


@pytest.mark.parametrize("counts", [[3, 2], [-1, 5], [4, 1 << 40]], ids=str)
def test_counts_that_do_not_add_up_are_an_error(counts: list[int]) -> None:
    kernel = KERNELS[0]
    packed = kernel.pack(random_weight(QuantSpec(4, 32), 8, 32, experts=2))
    with pytest.raises(ConfigError, match="contradict"):
        kernel.grouped_matmul(torch.randn(4, 32), packed, torch.tensor(counts))


def test_sizes_are_counted_in_64_bits() -> None:
    """A weight of 2**33 codes is laid out without being allocated; one of 2**70 is refused."""
    size = ctypes.c_int64()
    shape = {"group_size": 128, "experts": 64, "bits": 4, "zero": 0, "midpoint": 8, "scale_dtype": 2}
    big = native_library.Geometry(n=1 << 14, k=1 << 13, **shape)
    assert native_library.load().tl_packed_bytes(big, size) == 0
    assert size.value > 64 << 26
    huge = native_library.Geometry(n=1 << 35, k=1 << 35, **shape)
    assert native_library.load().tl_packed_bytes(huge, size) == 1


REFUSALS = {
    "codebook": (QuantSpec(4, 64, grid=Grid.NF4, zero=Zero.NONE), 64, "integer codes, not nf4"),
    "group of 12": (QuantSpec(4, 12), 64, "not a multiple of 8"),
    "static activations": (QuantSpec(4, 32, act=ActSpec(8, static=True)), 64, "static"),
    "groups that cross": (QuantSpec(4, 48, act=ActSpec(8, 32)), 96, "do not nest"),
    "act-order per group": (QuantSpec(4, 32, act=ActSpec(8, 32), act_order=True), 64, "scales per token"),
    "nothing": (QuantSpec(4, 32), 0, "empty"),
}


@pytest.mark.parametrize(("spec", "k", "reason"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals_say_why(spec: QuantSpec, k: int, reason: str) -> None:
    refusal = KERNELS[0].refuses(Problem(16, k, spec), HOST)
    assert refusal is not None
    assert reason in refusal


def test_uneven_act_order_groups_are_refused_by_pack() -> None:
    spec = QuantSpec(4, 32, act_order=True)
    g_idx = torch.tensor([0] * 33 + [1] * 31, dtype=torch.int32)
    w = QTensor(spec, torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 2), g_idx=g_idx)
    with pytest.raises(Unsupported, match="unequal sizes"):
        KERNELS[0].pack(w)


def test_rows_of_an_embedding_are_looked_up() -> None:
    w = random_weight(QuantSpec(4, 32, zero=Zero.MINS, scale_dtype=FP16), 70, 96)
    kernel = KERNELS[0]
    index = torch.tensor([69, 0, 33, 33])
    found = kernel.rows(kernel.pack(w), index)
    assert torch.equal(found.dequantize(), w.dequantize()[index])
    with pytest.raises(ConfigError, match=r"rows 3\.\.70"):
        kernel.rows(kernel.pack(w), torch.tensor([3, 70]))


def test_the_operators_pass_torchs_own_checks() -> None:
    """Schema, fake kernel and tracing as torch.compile needs them, for plain and grouped products."""
    kernel = KERNELS[0]
    for experts, counts in ((None, None), (2, torch.tensor([3, 1]))):
        packed = kernel.pack(random_weight(QuantSpec(4, 32), 24, 64, experts=experts)).tensors["packed"]
        arguments = (torch.randn(4, 64), packed, None, counts, 24, 8, 32, kernel.isa)
        torch.library.opcheck(torch.ops.transload_cpu.native_multiply, arguments)


def test_compiled_graphs_stay_whole() -> None:
    kernel = KERNELS[0]
    packed = kernel.pack(random_weight(QuantSpec(4, 32, act=ActSpec(8, 32)), 24, 64))
    compiled = torch.compile(lambda x: kernel.matmul(x.relu(), packed) + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    assert torch.equal(compiled(x), kernel.matmul(x.relu(), packed) + 1)


def test_a_missing_library_names_the_command_that_builds_it(tmp_path: object) -> None:
    with pytest.raises(BackendError, match=r"python -m transload_cpu\.build_native"):
        native_library.load(tmp_path / "none.so")  # type: ignore[operator]


def test_a_missing_compiler_is_said_plainly(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build_native.BuildFailed, match=r"no C\+\+ compiler found \(no-such-compiler\)"):
        build_native.build(tmp_path / "library.so")  # type: ignore[operator]
