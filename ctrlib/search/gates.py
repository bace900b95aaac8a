"""Gates of single values: a number for every row of a vocabulary, by which its vectors are multiplied under any model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib.batch import Batch, Output
from ctrlib.config import ConfigError
from ctrlib.embedding import FeatureEmbedding
from ctrlib.models.ctr import ModelComponent
from ctrlib.schema import suggest

Values = Mapping[str, npt.NDArray[np.bool_]]


def embeddings(model: nn.Module) -> list[FeatureEmbedding]:
    """Every feature embedding of a model: the main one, first-order weights, contexts of gates."""
    return [module for module in model.modules() if isinstance(module, FeatureEmbedding)]


class Gates(nn.Module):
    """One gate for every value of some vocabularies, numbers [...] → gates [..., 1]; see :meth:`.FeatureEmbedding.attach`.

    Args:
        sizes: ids by vocabulary, padding (which has no gate) and OOV (which has one) included.

    Attributes:
        first: by vocabulary; its id i ≥ 1 has gate number ``first[name] + i``.
        count: m, the number of gates. They are numbered from 1; number 0 is the open gate of everything else.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.sizes = dict(sizes)
        starts = np.cumsum([0, *(size - 1 for size in sizes.values())]).tolist()
        self.first = dict(zip(sizes, starts, strict=False))
        self.count: int = starts[-1]

    def __call__(self, numbers: Tensor) -> Tensor:
        return cast(Tensor, super().__call__(numbers))

    def by_value(self, gates_M: Tensor) -> dict[str, Tensor]:
        """What there is of each gate, cut into vocabularies: [m + 1] → [vocab_size − 1] by name, from OOV on."""
        return {name: gates_M[first + 1 : first + self.sizes[name]] for name, first in self.first.items()}


class ValueGates(Gates):
    """Soft gates g = σ(τ·g_c) / σ(g_c⁰), trained with the weights and hardened by a growing τ (OptFS, WWW 2023).

    At τ = 1 they start at exactly 1. As τ grows, a gate tends to 1/σ(g_c⁰) or to 0, as its logit is above 0 or below.

    Args:
        sizes: see :class:`Gates`.
        init: g_c⁰, where every logit starts.

    Attributes:
        logits: g_c [m + 1, 1]; the first one is not used.
        temperature: τ, a scalar that only the search's loop changes.
    """

    def __init__(self, sizes: Mapping[str, int], init: float = 0.5) -> None:
        super().__init__(sizes)
        self.logits = nn.Parameter(torch.full((self.count + 1, 1), init))
        self.init: Tensor
        self.temperature: Tensor
        self.register_buffer("init", torch.tensor(init))
        self.register_buffer("temperature", torch.tensor(1.0))

    @property
    def scale(self) -> float:
        """1/σ(g_c⁰), where the gates of kept values end."""
        return 1 + math.exp(-self.init.item())

    def forward(self, numbers: Tensor) -> Tensor:
        """Numbers of gates [...] → gates [..., 1]."""
        gates = torch.sigmoid(self.temperature * F.embedding(numbers, self.logits)) / torch.sigmoid(self.init)
        return torch.where(numbers.unsqueeze(-1) > 0, gates, 1.0)

    def openness(self) -> Tensor:
        """Σ σ(τ·g_c) over all values, whether in the batch or not: a scalar with a gradient for every gate."""
        return torch.sigmoid(self.temperature * self.logits[1:]).sum()

    def kept(self) -> dict[str, npt.NDArray[np.bool_]]:
        """1[g_c > 0]: by vocabulary [vocab_size] booleans, padding never."""
        return {
            name: np.append(False, (part > 0).cpu().numpy()) for name, part in self.by_value(self.logits.detach()[:, 0]).items()
        }


class ClosedGates(Gates):
    """Gates that nothing trains: 0 for dropped values, the same number for kept ones.

    Args:
        values: by vocabulary, which ids are kept: [vocab_size] booleans.
        scale: the gate of a kept value.
    """

    def __init__(self, values: Values, scale: float = 1.0) -> None:
        super().__init__({name: len(kept) for name, kept in values.items()})
        gates_M = np.concatenate([[1.0], *(scale * kept[1:] for kept in values.values())])
        self.gates: Tensor
        self.register_buffer("gates", torch.tensor(gates_M, dtype=torch.get_default_dtype()).unsqueeze(1))

    def forward(self, numbers: Tensor) -> Tensor:
        """Numbers of gates [...] → gates [..., 1]."""
        return F.embedding(numbers, self.gates)


class GatedModel(nn.Module):
    """A model under gates: those are attached to every embedding that it has. Batch → Output.

    In training, ``strength``·Σ σ(τ·g_c) is added as the auxiliary loss ``"gates"``.

    Args:
        model: its embeddings read the gates from here on, also where it is called by itself.
        gates: of vocabularies that the model reads.
        strength: λ; needs :class:`ValueGates`.

    Raises:
        ConfigError: a vocabulary that the model does not read, or of another size.
    """

    def __init__(self, model: ModelComponent, gates: Gates, strength: float = 0.0) -> None:
        super().__init__()
        found = embeddings(model)
        sizes = {name: len(rows) for embedding in found for name, rows in embedding.vocabularies.items()}
        for name, size in gates.sizes.items():
            if sizes.get(name) != size:
                problem = "which the model does not read" if name not in sizes else f"of which the model has {sizes[name]}"
                raise ConfigError(
                    f"there are gates for {size} ids of vocabulary {name!r}, {problem}{suggest(name, sizes.keys() - {name})}; "
                    "make them for the data and the fields of this model"
                )
        self.model = model
        self.gates = gates
        self.strength = strength
        for embedding in found:
            embedding.attach(gates.first, gates.__call__)  # a method, since a module would become part of the embedding

    def __call__(self, batch: Batch) -> Output:
        return cast(Output, super().__call__(batch))

    def forward(self, batch: Batch) -> Output:
        output = self.model(batch)
        if not (self.training and self.strength):
            return output
        penalty = self.strength * cast(ValueGates, self.gates).openness()
        return Output(output.logits, {**output.auxiliary, "gates": penalty})
