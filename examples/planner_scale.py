"""How planning time grows with the cluster: a 1T-parameter mixture on four kinds of devices. Writes a chart.

Usage: python examples/planner_scale.py CONFIG.json CHART.svg
"""

import json
import sys
import time
from pathlib import Path

from transload.plan.planner import plan

KINDS = (("H100", 8, 0.4), ("A3", 16, 0.48), ("H200", 8, 0.04), ("910B3", 8, 0.08))  # devices a node, share
RECIPE = "cuda=int4-g128,ascend=w4a8"
SIZES = (125, 250, 500, 1000, 2000, 4000, 8000)


def cluster(devices):
    """About that many devices, in the shares above."""
    nodes = [
        {
            "name": kind.lower(),
            "count": max(1, round(devices * share / size)),
            "devices": [{"type": kind, "count": size}],
        }
        for kind, size, share in KINDS
    ]
    return {"name": f"{devices} devices", "nodes": nodes}


def chart(rows):
    """An SVG line of seconds over devices, both axes linear."""
    width, height, pad = 640, 320, 56
    right, top = max(r[0] for r in rows), max(2.0, max(r[1] for r in rows)) * 1.1
    points = [(pad + (width - 2 * pad) * n / right, height - pad - (height - 2 * pad) * s / top) for n, s, _ in rows]
    text = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">']
    text += [f'<rect width="{width}" height="{height}" fill="#fff"/>']
    text += [f'<path d="M{pad},{pad} V{height - pad} H{width - pad}" fill="none" stroke="#333"/>']
    text += ['<polyline fill="none" stroke="#0072B2" stroke-width="2" points="']
    text += [" ".join(f"{x:.1f},{y:.1f}" for x, y in points), '"/>']
    for (x, y), (n, s, _) in zip(points, rows, strict=True):
        text += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#0072B2"/>']
        if n >= 1000:
            text += [f'<text x="{x:.1f}" y="{y - 10:.1f}" font-size="12" text-anchor="middle">{s:.1f} s</text>']
            text += [f'<text x="{x:.1f}" y="{height - pad + 18}" font-size="12" text-anchor="middle">{n}</text>']
    text += [f'<text x="{width / 2}" y="{height - 12}" font-size="13" text-anchor="middle">devices</text>']
    text += [f'<text x="{pad}" y="{pad - 14}" font-size="13">seconds of CPU time for a plan</text></svg>']
    return "\n".join(text) + "\n"


def main():
    config = json.loads(Path(sys.argv[1]).read_text())
    config.pop("quantization_config", None)
    plan(config, cluster(125), recipe=RECIPE)  # imports and catalogue
    rows = []
    for size in SIZES:
        start = time.process_time()
        answer = plan(
            config, cluster(size), {"context": "32k", "concurrency": 512, "objective": "tokens"}, recipe=RECIPE
        )
        rows.append((size, time.process_time() - start, answer.gap))
        print(f"{size:5} devices  {rows[-1][1]:5.2f} s  {len(answer.ranks):5} ranks  gap to the bound {answer.gap:.1%}")
    Path(sys.argv[2]).write_text(chart(rows))


if __name__ == "__main__":
    main()
