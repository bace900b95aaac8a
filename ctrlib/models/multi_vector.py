"""CTRModel in which every value has several vectors, for blocks that read more than one (FGCNN, HOFM, FFM, ONN)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ctrlib.config import ConfigError, positive
from ctrlib.interactions.base import Interaction
from ctrlib.models.ctr import CTRModel
from ctrlib.schema import BatchLayout


class MultiVectorModel(CTRModel):
    """:class:`CTRModel` over tokens [B, F, n·k]: the n vectors of a value, each of width k = ``embedding.dim``, side by side.

    One table of width n·k is what n tables of width k are (as many parameters, the same initial distribution, the same rows
    touched by a step), with one lookup instead of n. The first-order weights are those of :class:`CTRModel`.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(CTRModel.Config):
        """
        Args:
            vectors: n; ``"others"`` is F − 1, one for every other field, ``"fields"`` is F.
        """

        vectors: int | Literal["others", "fields"] = 2

        def __post_init__(self) -> None:
            if isinstance(self.vectors, int):
                positive("vectors", self.vectors)

    def __init__(self, config: Config, layout: BatchLayout) -> None:
        num_fields = len(layout.names if config.embedding.fields is None else config.embedding.fields)
        others = max(num_fields - 1, 1)  # of a single field, the block says that it has no pairs
        count = config.vectors if isinstance(config.vectors, int) else {"others": others, "fields": num_fields}[config.vectors]
        widened = replace(config.embedding, dim=count * config.embedding.dim)
        super().__init__(replace(config, embedding=widened), layout)
        self.config = config
        read = {m.vectors_read for m in self.interaction.modules() if isinstance(m, Interaction) and m.vectors_read}
        if read and read != {count}:
            raise ConfigError(
                f"vectors is {config.vectors!r}, {count} per value here, but the interaction reads "
                f"{' and '.join(map(str, sorted(read)))}; set vectors to that, or use a CTRModel where it is 1"
            )
