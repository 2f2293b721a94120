"""A parallel shape: how many ways the model is cut, and along what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """One engine instance: tp x pp x dp devices. ep spreads whole experts, dcp spreads the tokens of an MLA cache.

    dp counts attention replicas of one mixture-of-experts instance; dense models use separate instances instead.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: bool = False
    dcp: int = 1

    @property
    def devices(self) -> int:
        """Devices that one instance occupies."""
        return self.tp * self.pp * self.dp

    @property
    def expert_ranks(self) -> int:
        """Devices of one pipeline stage, over which the experts are spread (vLLM flattens TP over DP)."""
        return self.tp * self.dp

    @property
    def sequence_parallel_experts(self) -> bool:
        """True when vLLM runs the mixture on split sequences, and so keeps shared experts whole on each rank.

        vLLM 0.32, ParallelConfig.use_sequence_parallel_moe with the default all-to-all backend.
        """
        return self.ep and self.tp > 1 and self.dp > 1

    def experts_on(self, rank: int, count: int) -> int:
        """Whole experts that rank (dp_rank * tp + tp_rank) of a stage holds."""
        if not self.ep:
            return count
        share, rest = divmod(count, self.expert_ranks)
        return share + (rank < rest)

    def __str__(self) -> str:
        words = [f"TP{self.tp}"]
        words += [f"PP{self.pp}"] if self.pp > 1 else []
        words += [f"DP{self.dp}"] if self.dp > 1 else []
        words += ["EP"] if self.ep else []
        words += [f"DCP{self.dcp}"] if self.dcp > 1 else []
        return " ".join(words)


def even_cuts(layers: int, stages: int) -> tuple[int, ...]:
    """Layers per pipeline stage as vLLM cuts them by default (distributed/utils.get_pp_indices).

    The rest of the division goes to stages from the second-last backwards.

    >>> even_cuts(61, 4)
    (15, 15, 16, 15)
    """
    cuts = [layers // stages] * stages
    for i in range(2, layers % stages + 2):
        cuts[-i] += 1
    return tuple(cuts)
