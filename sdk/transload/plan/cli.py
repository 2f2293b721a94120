"""`transload plan`: where every shard goes. `transload plan MODEL`, `transload plan init`, `transload plan calibrate`.

A group with a default command: the first word is a command when it is one of the two names, a model otherwise (write
./init for a model folder of that name).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from transload.errors import ConfigError, OutputExists

if TYPE_CHECKING:
    from pydantic import BaseModel

    from transload.plan.cluster import Cluster
    from transload.plan.planner import Question
    from transload.plan.result import Plan

_DEFAULT = "model"


class _ModelFirst(TyperGroup):
    """Runs the default command unless the first word names another one or asks for help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="plan",
    cls=_ModelFirst,
    help="Plan a deployment: every byte on every device. Write: transload plan MODEL --cluster FILE [OPTIONS]. "
    "All options: transload plan MODEL --help.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(_DEFAULT)
def plan_model(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a config.json, or its URL.")],
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", "-c", help="A cluster file, or 8xH100, or 2x16xA3. Without it: this machine."),
    ] = None,
    workload: Annotated[Path | None, typer.Option(help="A workload file; options given beside it come first.")] = None,
    context: Annotated[str | None, typer.Option(help="The longest sequence, 32k = 32768 [default: 8k].")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Sequences that run at once [default: 16].")] = None,
    prompt: Annotated[str | None, typer.Option(help="Tokens of a typical prompt.")] = None,
    output: Annotated[str | None, typer.Option(help="Tokens of a typical answer.")] = None,
    hold_all: Annotated[bool, typer.Option("--hold-all", help="All sequences at full context must fit.")] = False,
    recipe: Annotated[
        str | None, typer.Option(help="As if quantized so: int4-g128, w4a8, fp8 ..., or cuda=int4-g128,ascend=w4a8.")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="throughput, latency, tokens or fewest [default: throughput].")
    ] = None,
    tp: Annotated[int | None, typer.Option("--tp", help="Tensor parallel size.")] = None,
    pp: Annotated[int | None, typer.Option("--pp", help="Pipeline stages.")] = None,
    dp: Annotated[int | None, typer.Option("--dp", help="Data parallel size of one instance.")] = None,
    ep: Annotated[bool | None, typer.Option("--ep/--no-ep", help="Expert parallelism.")] = None,
    dcp: Annotated[int | None, typer.Option("--dcp", help="Decode context parallel size.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm==0.32, vllm-ascend==0.23, vllm-ascend==main.")] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Fraction of a device that the engine may use.")
    ] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="bf16, fp8 or int8 [default: bf16].")] = None,
    max_num_batched_tokens: Annotated[str | None, typer.Option(help="Tokens of a prefill batch.")] = None,
    speculative_tokens: Annotated[int | None, typer.Option(help="MTP tokens a step, 0 = off [default: 0].")] = None,
    constants: Annotated[Path | None, typer.Option(help="A file that `calibrate` wrote.")] = None,
    what_if: Annotated[bool, typer.Option("--what-if", help="Also list single changes that make it fit.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="All reasons, in sentences.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Write the picture: a .svg or .html file.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan as JSON, for `transload launch`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Where every shard goes, with every byte accounted for; or why it does not fit. Exit code 2 when it does not."""
    from transload.plan.calibrate import load_constants
    from transload.plan.planner import answer, ask, checked_wish
    from transload.plan.workload import read_workload

    given = {
        "context": context, "concurrency": concurrency, "prompt": prompt, "output": output,
        "hold_all": hold_all or None,
        "kv_dtype": kv_cache_dtype, "batched_tokens": max_num_batched_tokens, "objective": objective,
        "speculative_tokens": speculative_tokens,
    }  # fmt: skip
    asked = read_workload(workload) if workload is not None else {}
    question = replace(
        ask(model, _cluster(cluster), {**asked, **{n: v for n, v in given.items() if v is not None}}, recipe),
        wish=checked_wish(tp, pp, dp, ep, dcp),
        engine=engine,
        utilization=gpu_memory_utilization,
        constants=load_constants(constants) if constants else None,
    )
    plan = answer(question)
    _write(plan, picture, save)
    if as_json:
        print(plan.to_json())
    else:
        _show(plan, question, explain, what_if or not plan.fits)
    if not plan.fits:
        raise typer.Exit(2)


@app.command("init")
def init(
    file: Annotated[Path, typer.Argument(help="The cluster file to write.")] = Path("cluster.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of cluster files instead.")] = False,
) -> None:
    """Writes a commented cluster file for this machine, to be edited."""
    if schema:
        import json

        from transload.plan.cluster import Cluster

        print(json.dumps(Cluster.model_json_schema(), indent=2))
        return
    from transload.plan.discover import cluster_text

    _new_file(file, cluster_text(), overwrite)
    print(f"wrote {file}; edit it, then: transload plan MODEL --cluster {file}")


@app.command("schema")
def schema(what: Annotated[str, typer.Argument(help="cluster, workload or plan.")] = "cluster") -> None:
    """Prints the JSON schema of cluster files, workload files, or of the plan that --json prints."""
    import json

    from transload.plan.cluster import Cluster
    from transload.plan.result import Plan
    from transload.plan.workload import Workload

    known: dict[str, type[BaseModel]] = {"cluster": Cluster, "workload": Workload, "plan": Plan}
    if what not in known:
        raise ConfigError(f"schema of '{what[:40]}': there are {', '.join(known)}")
    print(json.dumps(known[what].model_json_schema(), indent=2))


@app.command("calibrate")
def calibrate(
    logs: Annotated[list[Path], typer.Argument(help="Logs of engine starts.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The constants file to write.")] = Path("constants.yaml"),
    platform: Annotated[str, typer.Option(help="cuda, ascend or cpu.")] = "cuda",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Reads engine logs and writes constants measured there, for `transload plan --constants`."""
    from transload.plan.calibrate import calibrated, read_log, write_constants
    from transload.plan.catalogue import default_constants

    if platform not in default_constants():
        raise ConfigError(f"platform '{platform}': expected {', '.join(default_constants())}")
    measured = [read_log(log) for log in logs]
    constants = calibrated(measured, platform)
    _new_file(out, write_constants(constants), overwrite)
    for name, constant in constants[platform].items():
        if constant.kind == "measured":
            print(f"{name}: {constant.value} ({constant.source})")
    print(f"wrote {out}; use it with: transload plan MODEL --constants {out}")


def _cluster(text: str | None) -> Cluster:
    from transload.plan.cluster import load_cluster
    from transload.plan.discover import cluster_text

    if text is not None:
        return load_cluster(text)
    import yaml

    return load_cluster(yaml.safe_load(cluster_text()))


def _show(plan: Plan, question: Question, explain: bool, what_if: bool) -> None:
    from rich.console import Console

    from transload.plan.explain import explain as sentences
    from transload.plan.table import changes_table, plan_table
    from transload.plan.whatif import what_if as changes

    console = Console()
    if explain:
        for line in sentences(plan):
            console.print(line, markup=False, highlight=False)
    else:
        console.print(plan_table(plan, reasons=0 if plan.fits else 6))
    if what_if:
        console.print()
        console.print(changes_table(changes(question), plan.fits))


def _write(plan: Plan, picture: Path | None, save: Path | None) -> None:
    if picture is not None:
        from transload.plan.picture import plan_html, plan_svg

        if picture.suffix not in (".svg", ".html"):
            raise ConfigError(f"{picture}: a picture is a .svg or .html file")
        picture.write_text(plan_svg(plan) if picture.suffix == ".svg" else plan_html(plan), encoding="utf-8")
    if save is not None:
        plan.save(save)


def _new_file(path: Path, text: str, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise OutputExists(f"{path} exists; give --overwrite to replace it")
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
