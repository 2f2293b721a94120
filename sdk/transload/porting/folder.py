"""A port into a folder: safetensors, config.json, tokenizer and everything else that lies beside the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from transload.formats.activations import keep_cache_scheme
from transload.formats.base import Json
from transload.formats.plain import Plain
from transload.porting.container import Container
from transload.porting.moving import experts_of
from transload.porting.plan import PortPlan
from transload.writer import Layout, Slot, Writer, lay_out

_QUANTIZATION = ("quantization_config", "compression_config")


class Folder(Container):
    """Shards of safetensors, with the files of a Hugging Face model."""

    def layout(self) -> Layout:
        """Shards in the source's order; a stack of experts that stays one tensor has a slot for each of them."""
        whole = lay_out(self.plan.layout())
        slots = dict(whole.slots)
        for step in self.plan.steps:
            for name in step.outputs[0].tensors if experts_of(step) else ():
                if slots[name].nbytes:
                    slots |= _experts(name, slots.pop(name))
        return replace(whole, slots=slots)

    def write_files(self, writer: Writer) -> tuple[str, ...]:
        """config.json, the format's own descriptions, tokenizer and settings; files of the source are copied."""
        specs = {o.name: o.spec for o in self.plan.outputs() if o.spec is not None}
        carried = [name for o in self.plan.outputs() if o.spec is None for name in o.tensors]
        extra = dict(self.plan.format.finish(specs, dict(_float_linears(self.plan))))
        extra |= self.plan.format.describe(specs, carried)
        config = _config(self.source.config, self.plan) | extra.pop("config.json", {})
        keep_cache_scheme(self.source.config, config)
        writer.add_json("config.json", config)
        names = ["config.json", *extra]
        for name, value in extra.items():
            writer.add_json(name, value)
        for name, data in self.source.contained_files().items():
            writer.add_bytes(name, data)
            names.append(name)
        for file in self.source.carried_files():
            if file.name not in names:
                writer.carry(file)
                names.append(file.name)
        return tuple(names)

    def notes(self) -> Iterator[str]:
        """What the source says of itself, and code that was left behind."""
        yield from self.source.notes()
        code = [file.name for file in self.source.custom_code()]
        if code:
            yield f"code beside the weights was not copied: {', '.join(code)}"


def _experts(name: str, slot: Slot) -> dict[str, Slot]:
    """The slots of the experts in a stack, as `name[e]`."""
    count, *shape = slot.shape
    size = slot.nbytes // count
    return {
        f"{name}[{e}]": Slot(slot.file, slot.start + e * size, size, slot.dtype, tuple(shape), name, e * size)
        for e in range(count)
    }


def _float_linears(plan: PortPlan) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Modules whose weight is a float matrix, embeddings apart: formats list them as not quantized."""
    for output in plan.outputs():
        for name, (_, shape) in output.tensors.items() if output.spec is None else ():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and len(shape) == 2 and "emb" not in module.rpartition(".")[2]:
                yield module, shape


def _config(config: Mapping[str, object], plan: PortPlan) -> Json:
    """config.json without the source's quantization, with the dtype that engines should compute in."""
    clean = {key: value for key, value in config.items() if key not in _QUANTIZATION}
    inner = clean.get("text_config")
    if isinstance(inner, dict):
        clean["text_config"] = {key: value for key, value in inner.items() if key not in _QUANTIZATION}
    if isinstance(plan.format, Plain):
        clean.pop("torch_dtype", None)
        clean["dtype"] = str(plan.format.dtype).removeprefix("torch.")
    elif "dtype" not in clean and "torch_dtype" not in clean:
        clean["dtype"] = "bfloat16"
    return clean
