"""One HTML page with everything: numbers, plots, worst tokens. Self-contained, without scripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from transload.evaluation.plots import plots
from transload.evaluation.result import EvalReport, Subject, WorstToken
from transload.evaluation.table import headline, quality_rows, subject_rows

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% } th { text-align: left; font-weight: 600 }
td, th { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e5e5e5; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
code { background: #f3f3f3; padding: 0 .2rem; white-space: pre-wrap }
.broken { color: #b00020; font-weight: 600 } .met { color: #00713e } .quiet { color: #6a6a6a }
svg { max-width: 100%; height: auto }
"""


def page(report: EvalReport, broken: Sequence[str] = (), limits: int = 0) -> str:
    """The page. broken: sentences of the limits that were broken, out of `limits`. Raises ConfigError without
    matplotlib where there is something to plot."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f"<title>{escape(report.model.path)}: evaluation</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(headline(report))}</h1>",
            *_verdict(broken, limits),
            *_subjects(report),
            *_difference(report),
            f'<p class="quiet">{report.tokens} tokens of {escape(report.text)}, window {report.window}, stride '
            f"{report.stride}. Errors are one standard error.</p>",
            "</body></html>\n",
        ]
    )


def _verdict(broken: Sequence[str], limits: int) -> Iterator[str]:
    if limits and not broken:
        yield f'<p class="met">All {limits} limits hold.</p>'
    yield from (f'<p class="broken">{escape(sentence)}</p>' for sentence in broken)


def _subjects(report: EvalReport) -> Iterator[str]:
    subjects: list[Subject] = [report.model, *([report.source] if report.source is not None else [])]
    names = ["", "model", "source"][: len(subjects) + 1]
    columns = [subject_rows(subject) for subject in subjects]
    yield "<table><tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"
    for row in columns[0]:
        yield f"<tr><th>{escape(row)}</th>" + "".join(f"<td>{escape(c[row])}</td>" for c in columns) + "</tr>"
    yield "</table>"


def _difference(report: EvalReport) -> Iterator[str]:
    if report.difference is None:
        return
    yield "<h2>Against the source</h2>"
    yield _pairs(quality_rows(report.difference))
    for title, svg in plots(report.difference).items():
        yield f"<h2>{escape(title)}</h2>{svg}"
    yield "<h2>Tokens that differ most</h2>"
    yield "<table><tr><th>token</th><th>KL</th><th>after</th><th>probability</th><th>likeliest</th></tr>"
    yield from (_worst(token) for token in report.difference.worst)
    yield "</table>"


def _worst(w: WorstToken) -> str:
    return (
        f'<tr><td class="number">{w.position}</td><td class="number">{w.kl:.3f}</td>'
        f"<td><code>{_visible(w.before)}</code> <b><code>{_visible(w.token)}</code></b></td>"
        f'<td class="number">{w.source_probability:.1%} to {w.probability:.1%}</td>'
        f"<td><code>{_visible(w.source_likeliest)}</code> to <code>{_visible(w.likeliest)}</code></td></tr>"
    )


def _visible(text: str) -> str:
    return escape(text.replace("\n", "\u23ce").replace("\t", "\u21e5")) or "&nbsp;"


def _pairs(rows: Mapping[str, str]) -> str:
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f"<table>{body}</table>"
