"""Writes the schemas that `transload plan check` judges rendered YAML by, from their owners' files.

    PYTHON ci/launch_schemas.py COMPOSE_SPEC_JSON LEADERWORKERSET_CRD_YAML FOLDER

COMPOSE_SPEC_JSON: schema/compose-spec.json of compose-spec/compose-spec. LEADERWORKERSET_CRD_YAML:
config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml of kubernetes-sigs/lws. Both are under Apache-2.0.
Pod templates are left out of the second: they are Kubernetes' own type and judged by its own schema.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

_TEMPLATES = ("leaderTemplate", "workerTemplate")


def main() -> None:
    compose, crd, folder = (Path(word) for word in sys.argv[1:4])
    write(folder / "compose-spec.json", without_words(json.loads(compose.read_text())))
    versions = yaml.safe_load(crd.read_text())["spec"]["versions"]
    schema = next(v for v in versions if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    template = schema["properties"]["spec"]["properties"]["leaderWorkerTemplate"]["properties"]
    for name in _TEMPLATES:
        template[name] = {"type": "object"}
    schema["properties"]["metadata"] = {"type": "object"}
    write(folder / "leaderworkerset-v1.json", strict(without_words(schema)))


def without_words(schema: Any) -> Any:
    """The schema without descriptions: half of its size."""
    if isinstance(schema, list):
        return [without_words(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: without_words(v) for k, v in schema.items() if k != "description" or not isinstance(v, str)}


def strict(schema: Any) -> Any:
    """The schema with unknown fields refused, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {k: strict(v) for k, v in schema.items() if not k.startswith("x-kubernetes-")}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        out.setdefault("additionalProperties", False)
    return out


def write(path: Path, schema: Any) -> None:
    path.write_text(json.dumps(schema, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8")


main()
