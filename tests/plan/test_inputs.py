"""What people and damaged files put in: named, bounded, without a traceback."""

from __future__ import annotations

import json
import os
import struct
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from plan.models import CONFIGS, config
from transload.errors import ConfigError, FormatError, TransloadError
from transload.plan import cli
from transload.plan.catalogue import device, devices
from transload.plan.cluster import Cluster, load_cluster
from transload.plan.planner import checked_workload, plan
from transload.plan.recipes import recipe_by_name
from transload.plan.sources import load_model
from transload.plan.units import parse_size, parse_tokens
from transload.plan.workload import Workload
from transload.plan.yamlfile import LARGEST_FILE

EXAMPLES = Path(__file__).parents[2] / "examples" / "clusters"
NODE = {"name": "n", "devices": [{"type": "H100", "count": 8}]}


def _node(**device_fields: Any) -> dict[str, object]:
    return {"nodes": [{"name": "n", "devices": [{"type": "H100", **device_fields}]}]}


BAD_CLUSTERS = {
    "negative memory": (_node(memory="-5 GB"), "expected a positive number"),
    "absurd memory": (_node(memory="9999999999999999 TB"), "larger than an exbibyte"),
    "no count": (_node(count=0), "greater than or equal to 1"),
    "unknown field": (_node(cuont=8), "cuont"),
    "unknown device": (_node(type="H10O"), "nearest: H100"),
    "no nodes": ({"nodes": []}, "nodes"),
    "twice the same name": ({"nodes": [NODE, NODE]}, "two nodes are called 'n'"),
    "a million nodes": ({"nodes": [{**NODE, "count": 1_000_000}]}, "count"),
    "too many devices": ({"nodes": [{**NODE, "count": 90_000}]}, "more than the 100000"),
    "usable of two": (_node(usable=2), "usable"),
    "not a list": ({"nodes": {"a": 1}}, "nodes"),
    "text for a number": (_node(count="eight"), "count"),
    "a shell in a name": ({"nodes": [{**NODE, "name": "n; rm -rf"}]}, "name"),
}


@pytest.mark.parametrize("name", BAD_CLUSTERS)
def test_a_bad_cluster_is_refused_by_name(name: str) -> None:
    data, words = BAD_CLUSTERS[name]
    with pytest.raises(ConfigError, match=words):
        load_cluster(data)


def test_yaml_that_refers_to_itself_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("nodes: &n\n  - *n\n")
    with pytest.raises(ConfigError, match="line 2: aliases"):
        load_cluster(file)


def test_yaml_that_explodes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bomb.yaml"
    rows = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    file.write_text("\n".join(rows))
    with pytest.raises(ConfigError, match="aliases"):
        load_cluster(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodes: [", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("- 1\n- 2\n", "expected a mapping"),
        ("x" * (LARGEST_FILE + 1), "bytes, more than"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
    ids=["open bracket", "deep", "a list", "too large", "a python object"],
)
def test_a_bad_yaml_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_cluster(file)


class _Config(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path == "/Qwen/Qwen3-8B/resolve/main/config.json"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(json.dumps(config("Qwen3-8B")).encode() if found else b"")

    def log_message(self, *_: object) -> None:
        pass


def test_a_remote_config_is_a_model() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Config) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}/Qwen/Qwen3-8B/resolve/main"
        assert plan(f"{root}/config.json", "1xH100").kv_tokens == plan(config("Qwen3-8B"), "1xH100").kv_tokens
        with pytest.raises(ConfigError, match=r"other/config.json: cannot be fetched"):
            load_model(f"{root}/other")
        server.shutdown()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_cluster(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="no such folder or config file"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "field 'hidden_size' is missing"),
        ({"num_hidden_layers": -4}, "'num_hidden_layers' is -4"),
        ({"num_hidden_layers": 10**9}, "expected an integer 1 to 10000"),
        ({"vocab_size": "many"}, "'vocab_size' is 'many'"),
        ({"model_type": "gpt9"}, "model_type 'gpt9' is not known; known are"),
        ({"num_attention_heads": True}, "'num_attention_heads' is True"),
        ({"quantization_config": {"quant_method": "magic"}}, "quant_method 'magic' is not understood"),
        ({"quantization_config": {"quant_method": "gptq", "bits": "four"}}, "'bits' is 'four'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_bad_config_names_the_field(change: dict[str, object], words: str) -> None:
    broken = {k: v for k, v in {**config("Qwen3-8B"), **change}.items() if v is not None}
    with pytest.raises(ConfigError, match=words):
        plan(broken, "1xH100")


@pytest.mark.parametrize(
    ("workload", "words"),
    [
        ({"context": -1}, "context"),
        ({"context": "many"}, "token count 'many'"),
        ({"concurrency": 0}, "concurrency"),
        ({"context": 100, "prompt": 90, "output": 20}, "longer than the context"),
        ({"kv_dtype": "fp3"}, "kv_dtype"),
        ({"speed": 9}, "speed"),
    ],
)
def test_a_bad_workload_names_the_field(workload: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        checked_workload(workload)


def test_other_bad_arguments() -> None:
    for arguments, words in [
        ({"recipe": "int4-g12x"}, "nearest are"),
        ({"recipe": "amd=int4-g128"}, "expected cuda, ascend, cpu"),
        ({"engine": "vllm==9.9"}, "engine 'vllm==9.9' is not known"),
        ({"gpu_memory_utilization": 1.5}, "expected more than 0"),
        ({"tp": 0}, "tp 0"),
    ]:
        with pytest.raises(TransloadError, match=words):
            plan(config("Qwen3-8B"), "1xH100", **arguments)


def test_a_context_beyond_the_model_is_a_reason() -> None:
    answer = plan(config("Qwen3-8B"), "8xH100", {"context": "1m"})
    assert not answer.fits
    assert "longer than the model's 40960 positions" in answer.reason


def test_sizes_and_tokens() -> None:
    assert parse_size("1.5 GiB") == 3 << 29
    assert parse_size(1e9) == 10**9
    assert parse_tokens("128k") == 131072
    assert recipe_by_name("awq-g128").default.zeros == 4


def test_the_catalogue_is_complete() -> None:
    names = {d.name for d in devices().values()}
    assert {"T4", "B200", "H100", "Ascend-310P-Duo", "Ascend-910B1", "Ascend-910B4", "Ascend-A3-die"} <= names
    assert all(d.flops for d in devices().values())
    assert all("https://" in d.source or "general knowledge" in d.source for d in devices().values())
    assert device("a3").island == 16


@pytest.mark.parametrize("kind", [Cluster, Workload], ids=["cluster", "workload"])
def test_the_published_schema_is_the_one_in_use(kind: type[Cluster | Workload]) -> None:
    schema = json.loads((EXAMPLES / f"{kind.__name__.lower()}.schema.json").read_text())
    assert schema == kind.model_json_schema()


def test_a_workload_file_is_read_and_options_come_first(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text("context: 16k\nconcurrency: 4\nkv_dtype: fp8\n")
    assert checked_workload(file) == Workload(context="16k", concurrency=4, kv_dtype="fp8")
    run = CliRunner().invoke(
        cli.app,
        [str(CONFIGS / "Qwen3-8B.json"), "-c", "1xH100", "--workload", str(file), "--concurrency", "8", "--json"],
    )
    answer = json.loads(run.output)
    assert (answer["context"], answer["concurrency"]) == (16384, 8)
    assert answer["deployments"][0]["kv_cache_dtype"] == "fp8"
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping such as"):
        checked_workload(file)


def test_schemas_are_printed() -> None:
    for what, field in [("cluster", "nodes"), ("workload", "context"), ("plan", "deployments")]:
        run = CliRunner().invoke(cli.app, ["schema", what])
        assert field in json.loads(run.output)["properties"]
    assert isinstance(CliRunner().invoke(cli.app, ["schema", "cloud"]).exception, ConfigError)


@pytest.mark.parametrize(
    "file", sorted(f for f in EXAMPLES.glob("*.yaml") if f.stem != "workload"), ids=lambda f: f.stem
)
def test_example_clusters_load_and_plan(file: Path) -> None:
    assert plan(config("Qwen3-8B"), file, {"context": "8k"}, recipe="w8a8").ranks


def _safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file of zeros, written by its specification."""
    width = {"BF16": 2, "F32": 4, "I32": 4, "I8": 1, "F8_E4M3": 1}
    header, at = dict[str, object](), 0
    for name, (dtype, shape) in tensors.items():
        size = width[dtype]
        for d in shape:
            size *= d
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


TINY = {
    "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 640,
    "max_position_embeddings": 4096,
}  # fmt: skip


def _folder(path: Path, linears: Any, extra: dict[str, tuple[str, tuple[int, ...]]] | None = None) -> Path:
    """A tiny Qwen3 checkpoint. linears(name, n, k) gives the tensors of one linear."""
    shapes = {
        "self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256),
        "self_attn.o_proj": (256, 256), "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256),
        "mlp.down_proj": (256, 512),
    }  # fmt: skip
    tensors = {"model.embed_tokens.weight": ("BF16", (640, 256)), "lm_head.weight": ("BF16", (640, 256))}
    for i in range(2):
        for name, (n, k) in shapes.items():
            tensors.update({f"model.layers.{i}.{name}.{s}": t for s, t in linears(name, n, k).items()})
    _safetensors(path / "model.safetensors", {**tensors, **(extra or {})})
    (path / "config.json").write_text(json.dumps(TINY))
    return path


def _gptq(_: str, n: int, k: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    groups = k // 64
    return {"qweight": ("I32", (k // 8, n)), "scales": ("BF16", (groups, n)), "qzeros": ("I32", (groups, n // 8))}


def _packed(_: str, n: int, k: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        "weight_packed": ("I32", (n, k // 8)),
        "weight_scale": ("BF16", (n, k // 32)),
        "weight_shape": ("I32", (2,)),
    }


def _mixed(name: str, n: int, k: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {"weight": ("BF16", (n, k))} if name == "mlp.down_proj" else _packed(name, n, k)


@pytest.mark.parametrize(
    ("linears", "recipe"),
    [(_gptq, "int4-g64"), (_packed, "int4-g32"), (lambda _, n, k: {"weight": ("BF16", (n, k))}, "bf16")],
    ids=["gptq", "compressed-tensors", "float"],
)
def test_headers_say_what_a_checkpoint_is(tmp_path: Path, linears: Any, recipe: str) -> None:
    read = plan(_folder(tmp_path, linears), "1xH100", {"context": 1024})
    assert read.fits
    said = plan(TINY, "1xH100", {"context": 1024}, recipe=recipe)
    assert read.ranks[0].weights_bytes == said.ranks[0].weights_bytes


def test_headers_may_mix_precisions(tmp_path: Path) -> None:
    mixed = plan(_folder(tmp_path, _mixed), "1xH100", {"context": 1024}).ranks[0].weights_bytes
    low = plan(TINY, "1xH100", {"context": 1024}, recipe="int4-g32").ranks[0].weights_bytes
    assert mixed - low == 2 * (256 * 512 * 2 - (256 * 512 // 2 + 256 * 16 * 2))


def test_headers_that_contradict_the_config_are_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path, lambda _, n, k: {"weight": ("BF16", (n, k))})
    (folder / "config.json").write_text(json.dumps({**TINY, "intermediate_size": 768}))
    with pytest.raises(FormatError, match=r"gate_proj.weight is \(512, 256\), the config says \(768, 256\)"):
        plan(folder, "1xH100")


def _eight(_: str, n: int, k: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {"weight_packed": ("I32", (n, k // 4)), "weight_scale": ("BF16", (n, 1)), "weight_shape": ("I32", (2,))}


def test_packed_words_are_of_the_width_that_the_config_implies(tmp_path: Path) -> None:
    read = plan(_folder(tmp_path, _eight), "1xH100", {"context": 1024})
    said = plan(TINY, "1xH100", {"context": 1024}, recipe="int8-channel")
    assert read.ranks[0].weights_bytes == said.ranks[0].weights_bytes


def _one_wrong(packing: Any, name: str, n: int, k: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return packing(name, n, k * 3) if name == "mlp.up_proj" else packing(name, n, k)


@pytest.mark.parametrize(
    ("packing", "words"),
    [
        (_gptq, r"up_proj.qweight is \(96, 512\), which holds \(512, 768\), the config says \(512, 256\)"),
        (_packed, "up_proj.weight_packed has 96 words a row, which are 256 inputs of the config at"),
    ],
    ids=["gptq", "compressed-tensors"],
)
def test_packed_weights_of_the_wrong_shape_are_refused(tmp_path: Path, packing: Any, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        plan(_folder(tmp_path, lambda name, n, k: _one_wrong(packing, name, n, k)), "1xH100")


def test_a_module_that_is_missing_beside_its_neighbours_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path, lambda name, n, k: {} if name == "mlp.up_proj" else _packed(name, n, k))
    with pytest.raises(FormatError, match=r"model.layers.0.mlp.up_proj is missing from the checkpoint"):
        plan(folder, "1xH100")


def test_tensors_that_nothing_explains_are_counted_and_said(tmp_path: Path) -> None:
    extra = {"audio_tower.proj.weight": ("BF16", (1000, 100))}
    plain = plan(_folder(tmp_path, _packed), "1xH100", {"context": 1024})
    other = plan(_folder(tmp_path, _packed, extra), "1xH100", {"context": 1024})
    assert other.ranks[0].weights_bytes - plain.ranks[0].weights_bytes == 200_000
    assert any("audio_tower.proj.weight" in w for w in other.warnings)


@pytest.mark.skipif("TRANSLOAD_TEST_MODELS" not in os.environ, reason="TRANSLOAD_TEST_MODELS names no folder of models")
def test_gguf_files_are_counted_to_within_their_tokenizer() -> None:
    files = sorted(Path(os.environ["TRANSLOAD_TEST_MODELS"]).glob("*.gguf"))
    if not files:
        pytest.skip("no GGUF file in TRANSLOAD_TEST_MODELS")
    for file in files:
        answer = plan(str(file), "1xT4", {"context": 2048})
        assert not answer.fits
        assert "does not load" in answer.reason
        counted, size = sum(m.size for m in answer.modules), file.stat().st_size
        assert 0.95 * size < counted < size
        assert set(answer.device_map().values()) == {0}
