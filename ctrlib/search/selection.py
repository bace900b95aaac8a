"""What every selection method returns: fields by score, the values to keep, or what becomes of each pair of fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ctrlib.config import check_choice
from ctrlib.models.ctr import ModelComponent

Choice = Literal["memorize", "factorize", "naive"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A result of feature or interaction selection, to be saved, applied, re-trained.

    Attributes:
        method: its name, as in ``ctrlib select --method``.
        encoder_hash: of the encoder (schema and vocabularies) that it was made with; it is refused for any other.
        fields: kept, in the order of the schema; ``None``: all.
        values: by vocabulary (table name), which ids are kept: [vocab_size] booleans, padding never; ``None``: all.
        pairs: by ``"user*item"``, what to do with the pair; ``None``: the method does not choose pairs.
        scores: of fields or of pairs, larger is better; empty where a method has none.
        model: the model to re-train; ``None``: any.
        weights: ``state_dict`` of that model from which re-training starts, before compaction; ``None``: from scratch.
        report: settings, seconds and whatever else the method has to say; JSON.
    """

    method: str
    encoder_hash: str
    fields: tuple[str, ...] | None = None
    values: Mapping[str, npt.NDArray[np.bool_]] | None = None
    pairs: Mapping[str, Choice] | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    model: ModelComponent.Config | None = None
    weights: Mapping[str, Tensor] | None = None
    report: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pair, choice in (self.pairs or {}).items():
            check_choice(f"pairs[{pair!r}]", choice, get_args(Choice))
