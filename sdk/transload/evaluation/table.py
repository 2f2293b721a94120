"""The numbers in words, for the terminal and for the page."""

from __future__ import annotations

from transload.evaluation.result import Difference, EvalReport, Subject


def headline(report: EvalReport) -> str:
    """One sentence."""
    d = report.difference
    if d is None:
        return f"{report.model.path}: perplexity {report.model.perplexity:.4f} over {report.tokens} tokens"
    return (
        f"{report.model.path}: perplexity {d.perplexity_increase:+.2%}, KL {d.kl:.4g}, same likeliest token "
        f"{d.top1:.1%}, against {report.source.path if report.source else ''}"
    )


def subject_rows(subject: Subject) -> dict[str, str]:
    """Names and values of one model."""
    written = subject.write_per_second
    return {
        "path": subject.path,
        "format": subject.format,
        "runs": subject.scheme,
        "kernels": ", ".join(subject.kernels) or "none: a float model",
        "weights": f"{subject.weight_bytes / 1e6:.1f} MB",
        "perplexity": f"{subject.perplexity:.4f} \u00b1 {subject.perplexity_error:.4f}",
        "reads": f"{subject.read_per_second:.0f} tokens/s",
        "writes": "does not generate" if written is None else f"{written:.1f} tokens/s",
    }


def quality_rows(d: Difference) -> dict[str, str]:
    """Names and values of the difference between a model and its source."""
    rows = {
        "perplexity": f"{d.perplexity_increase:+.3%} \u00b1 {d.perplexity_increase_error:.3%}",
        "KL divergence": f"{d.kl:.5f} \u00b1 {d.kl_error:.5f} nats per token (one in a hundred above {d.kl_p99:.4f}, "
        f"largest {d.kl_max:.3f})",
        "same likeliest token": f"{d.top1:.2%}",
        "overlap of the top five": f"{d.top5:.2%}",
    }
    if d.sqnr:
        worst = min(d.sqnr, key=lambda name: d.sqnr[name])
        last = list(d.sqnr)[-1]
        rows["SQNR of layer outputs"] = f"worst {d.sqnr[worst]:.1f} dB ({worst}), last {d.sqnr[last]:.1f} dB"
    return rows
