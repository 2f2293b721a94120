"""A plan as a picture: every node with its devices, each a stacked bar of what fills its memory. SVG or HTML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from transload.plan.explain import headline, shape_name
from transload.plan.result import Plan, Rank
from transload.plan.units import show_bytes

# Colour-blind safe (Okabe and Ito), with a light grey for what is free.
COLOURS = {
    "weights": "#0072B2",
    "KV cache": "#009E73",
    "activations": "#E69F00",
    "other": "#CC79A7",
    "free": "#E8E8E8",
}
_BAR_W, _BAR_H, _GAP, _PAD, _TOP, _PER_ROW = 46, 170, 10, 16, 116, 16
MOST_NODES = 24


def plan_svg(plan: Plan) -> str:
    """The picture as a standalone SVG document. Nodes beyond MOST_NODES are counted, not drawn."""
    nodes = _nodes(plan)
    drawn = list(nodes.items())[:MOST_NODES]
    body, y = list[str](), _TOP
    widest = min(_PER_ROW, max((len(ranks) for _, ranks in drawn), default=1))
    width = max(760, 2 * _PAD + 2 * 12 + widest * (_BAR_W + _GAP))
    for name, ranks in drawn:
        rows = [ranks[i : i + _PER_ROW] for i in range(0, len(ranks), _PER_ROW)]
        height = 34 + len(rows) * (_BAR_H + 44)
        body += [_box(_PAD, y, width - 2 * _PAD, height), _text(_PAD + 12, y + 22, _title(name, ranks), 14, bold=True)]
        for i, row in enumerate(rows):
            body += _row(plan, row, _PAD + 12, y + 34 + i * (_BAR_H + 44))
        y += height + 12
    if len(nodes) > len(drawn):
        body.append(_text(_PAD, y + 14, f"and {len(nodes) - len(drawn)} more nodes like these", 13))
        y += 26
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 8}" viewBox="0 0 {width} {y + 8}" '
            'font-family="system-ui, sans-serif" role="img">',
            f"<title>{escape(headline(plan))}</title>",
            f'<rect width="{width}" height="{y + 8}" fill="#ffffff"/>',
            *_header(plan, width),
            *body,
            "</svg>",
        ]
    )


def plan_html(plan: Plan) -> str:
    """A page with the picture and the reasons, without scripts or outside resources."""
    from transload.plan.explain import explain

    lines = "\n".join(f"<li>{escape(line)}</li>" for line in explain(plan)[1:41])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(plan.model)} on {escape(plan.cluster)}</title>"
        "<style>body{font:15px system-ui,sans-serif;margin:24px;color:#222}svg{max-width:100%;height:auto}"
        "li{margin:4px 0}</style></head><body>\n"
        f"{plan_svg(plan)}\n<h2>Why</h2>\n<ul>\n{lines}\n</ul>\n</body></html>\n"
    )


def _header(plan: Plan, width: int) -> Iterator[str]:
    colour = "#1B7F4B" if plan.fits else "#B3261E"
    yield _text(_PAD, 30, f"{plan.model} ({plan.recipe}) on {plan.cluster}", 19, bold=True)
    if plan.fits:
        shapes = ", ".join(f"{d.replicas} × {shape_name(d.parallelism)} on {d.device}" for d in plan.deployments)
        text = f"fits: {shapes} · {plan.kv_tokens:,} KV tokens · {plan.max_concurrency:g} × {plan.context:,} tokens"
    else:
        text = f"does not fit: {plan.reason}"
    most = max(40, int(width / 7.2))
    yield _text(_PAD, 54, text if len(text) <= most else text[: most - 1] + "…", 14, fill=colour)
    x = _PAD
    for name, fill in COLOURS.items():
        yield f'<rect x="{x}" y="72" width="14" height="14" rx="2" fill="{fill}" stroke="#999" stroke-width="0.5"/>'
        yield _text(x + 20, 84, name, 13)
        x += 34 + 8 * len(name)
    yield _text(
        _PAD,
        106,
        "one bar a device, as high as its memory, and its data (d), pipeline (p) and tensor (t) rank; hover for bytes",
        12,
        fill="#666",
    )


def _nodes(plan: Plan) -> dict[str, list[Rank]]:
    out: dict[str, list[Rank]] = {}
    for rank in sorted(plan.ranks, key=lambda r: r.device):
        out.setdefault(rank.node, []).append(rank)
    order = list(dict.fromkeys(r.node for r in plan.ranks))
    return {name: out[name] for name in order}


def _title(name: str, ranks: Sequence[Rank]) -> str:
    kinds: dict[str, int] = {}
    for rank in ranks:
        kinds[rank.device_type] = kinds.get(rank.device_type, 0) + 1
    return f"{name}: {', '.join(f'{count} × {kind}' for kind, count in kinds.items())}"


def _row(plan: Plan, ranks: Sequence[Rank], x: int, y: int) -> Iterator[str]:
    largest = max(s.total for d in plan.deployments for s in d.stages)
    for rank in ranks:
        total = plan.deployments[rank.deployment].stages[rank.stage].total
        height = _BAR_H * total / largest
        yield from _bar(rank, total, x, y + _BAR_H - height, height)
        yield _text(x + _BAR_W / 2, y + _BAR_H + 15, str(rank.device), 12, middle=True)
        yield _text(x + _BAR_W / 2, y + _BAR_H + 30, _role(plan, rank), 10, fill="#666", middle=True)
        x += _BAR_W + _GAP


def _bar(rank: Rank, total: int, x: float, y: float, height: float) -> Iterator[str]:
    sizes = (rank.weights_bytes, rank.kv_bytes, rank.activation_bytes, rank.overhead_bytes, rank.free_bytes)
    words = ", ".join(f"{name} {show_bytes(size)}" for name, size in zip(COLOURS, sizes, strict=True))
    tip = (
        f"{rank.node} device {rank.device} ({rank.device_type}): {words}; layers {rank.layers[0]}-{rank.layers[1] - 1}"
    )
    yield f"<g><title>{escape(tip)}</title>"
    bottom = y + height
    for size, fill in zip(sizes, COLOURS.values(), strict=True):
        part = height * max(size, 0) / total
        bottom -= part
        yield f'<rect x="{x}" y="{bottom:.1f}" width="{_BAR_W}" height="{part:.1f}" fill="{fill}"/>'
        if part > 14 and fill != COLOURS["free"]:
            label = f"{size / (1 << 30):.0f}G"
            yield _text(x + _BAR_W / 2, bottom + part / 2 + 4, label, 11, fill="#ffffff", middle=True)
    yield f'<rect x="{x}" y="{y:.1f}" width="{_BAR_W}" height="{height:.1f}" fill="none" stroke="#555" rx="2"/></g>'


def _role(plan: Plan, rank: Rank) -> str:
    shape = plan.deployments[rank.deployment].parallelism
    parts = [f"r{rank.replica}"] if plan.deployments[rank.deployment].replicas > 1 else []
    parts += [f"d{rank.dp_rank}"] if shape.dp > 1 else []
    parts += [f"p{rank.stage}"] if shape.pp > 1 else []
    return " ".join([*parts, f"t{rank.tp_rank}"])


def _box(x: float, y: float, width: float, height: float) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="#FAFAFA" stroke="#CCC"/>'


def _text(
    x: float, y: float, text: str, size: int, fill: str = "#222", bold: bool = False, middle: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    anchor = ' text-anchor="middle"' if middle else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}"{weight}{anchor}>{escape(text)}</text>'
