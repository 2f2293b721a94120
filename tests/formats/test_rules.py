"""Rules for the modules that differ: they match what they should, under fused names too, and nothing else."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from transload.formats.rules import commonest, exceptions

NAMES = st.sampled_from(
    [
        f"model.layers.{i}.{m}"
        for i in (0, 1, 12)
        for m in ("mlp.gate", "mlp.gate_proj", "mlp.experts.3.w1", "attn.o_proj")
    ]
    + ["lm_head"]
)


@given(st.dictionaries(NAMES, st.sampled_from("abc"), min_size=1))
def test_the_first_matching_rule_gives_every_module_its_fate(fates: dict[str, str]) -> None:
    default = commonest(fates)
    rules = exceptions(fates, default)
    for name, fate in fates.items():
        assert next((f for rule, f in rules if re.match(rule, name)), default) == fate


def test_layers_of_one_fate_share_a_rule() -> None:
    fates = {f"model.layers.{i}.mlp.gate": None for i in range(40)} | {f"model.layers.{i}.mlp.up": 4 for i in range(41)}
    assert exceptions(fates, 4) == [(r"^model\.layers\.\d+\.mlp\.gate$", None)]


def test_fused_names_get_a_rule_when_all_members_agree() -> None:
    fates = dict.fromkeys(("m.q_proj", "m.k_proj", "m.v_proj", "m.gate_proj"), 8) | {"m.up_proj": 4, "m.down_proj": 4}
    rules = exceptions(fates, 4)
    assert any(re.match(rule, "m.qkv_proj") for rule, _ in rules)
    assert not any(re.match(rule, "m.gate_up_proj") for rule, _ in rules)
