"""The import rules of docs/architecture.md, enforced on the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SDK = ROOT / "sdk" / "transload"
BACKENDS = sorted(p.name for p in (ROOT / "backends").iterdir() if p.is_dir())
FOUNDATION = ("errors", "quant", "bits", "reference", "hal")

# What each part of the sdk may import from transload. A part is a module or package directly under transload.
MAY_IMPORT = {
    "errors": set(),
    "quant": {"errors"},
    "bits": {"errors", "quant"},
    "reference": {"errors", "quant", "bits"},
    "hal": {"errors", "quant", "bits", "reference"},
    "headers": {"errors"},
    "models": {"errors", "headers"},
    "formats": {"errors", "quant", "bits", "headers", "models"},
    "layouts": {"errors", "quant", "headers", "models", "formats"},
    "package": set(),
    "plan": {"errors", "headers", "models", "package"},
    "serve": {"errors", "package", "headers", "plan", "launch", "engines", "inspection", "checkpoint", "porting"},
    "launch": {"errors", "plan", "__version__"},
}
TORCH_FREE = ("errors", "headers", "plan", "launch", "models")


def _files(part: str) -> list[Path]:
    package = SDK / part
    return sorted(package.rglob("*.py")) if package.is_dir() else [SDK / f"{part}.py"]


def _imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names imported anywhere in a file (or only at module level)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _parts_of(path: Path) -> set[str]:
    return {name.split(".")[1] for name in _imports(path) if name.startswith("transload.")}


@pytest.mark.parametrize("part", [p for p in sorted(MAY_IMPORT) if (SDK / p).exists() or (SDK / f"{p}.py").exists()])
def test_a_part_imports_only_what_lies_below_it(part: str) -> None:
    for path in _files(part):
        beyond = _parts_of(path) - MAY_IMPORT[part] - {part}
        assert not beyond, f"{path.relative_to(ROOT)} imports {sorted(beyond)}"


def test_nothing_imports_the_cli() -> None:
    for path in sorted(SDK.rglob("*.py")):
        if path.relative_to(SDK).parts[0] not in ("cli", "__main__.py"):
            assert "cli" not in _parts_of(path), path


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_imports_only_the_foundation(backend: str) -> None:
    for path in sorted((ROOT / "backends" / backend).rglob("*.py")):
        assert _parts_of(path) <= set(FOUNDATION), path
        others = {name.split(".")[0] for name in _imports(path)} & set(BACKENDS)
        assert others <= {backend}, f"{path} imports {others}"


def test_the_sdk_never_imports_a_backend() -> None:
    for path in sorted(SDK.rglob("*.py")):
        assert not {name.split(".")[0] for name in _imports(path)} & set(BACKENDS), path


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_imports_no_vendor_library_at_import(backend: str) -> None:
    vendors = {"onnxruntime", "onnx", "triton", "torch_npu"}
    for path in sorted((ROOT / "backends" / backend).rglob("*.py")):
        if path.parent.name != "jit":  # device code in a vendor's language, imported by the first product
            assert not {name.split(".")[0] for name in _imports(path, top_level_only=True)} & vendors, path
    code = f"import {backend}, sys; print(sorted({vendors} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["transload", "transload.cli", "transload.headers"])
def test_import_without_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("part", [p for p in TORCH_FREE if (SDK / p).exists() or (SDK / f"{p}.py").exists()])
def test_torch_free_parts(part: str) -> None:
    for path in _files(part):
        assert "torch" not in {name.split(".")[0] for name in _imports(path)}, path
