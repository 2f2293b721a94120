"""Writing a checkpoint: laid out in advance, one tensor in memory, resumable, and visible only when complete."""

from transload.writer.layout import MAX_SHARD_BYTES, Layout, Plan, Shard, Slot, lay_out
from transload.writer.writer import Writer

__all__ = ["MAX_SHARD_BYTES", "Layout", "Plan", "Shard", "Slot", "Writer", "lay_out"]
