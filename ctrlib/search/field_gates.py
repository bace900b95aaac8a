"""One number for every field, by which its tokens are multiplied, under any model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.embedding import FeatureEmbedding
from ctrlib.schema import suggest


def field_embeddings(model: nn.Module, names: Sequence[str]) -> list[FeatureEmbedding]:
    """Every embedding through which a model reads these fields: main, first-order, contexts.

    Raises:
        ConfigError: they read another field, or one of these is read by none of them, so that no gate or gradient of its token
            would say what it is worth.
    """
    embeddings = [m for m in model.modules() if isinstance(m, FeatureEmbedding)]
    read = {name for embedding in embeddings for name in embedding.out.names}
    for name in sorted(read - set(names)):
        raise ConfigError(f"the model reads field {name!r}, which is not among the fields to look at{suggest(name, names)}")
    for name in names:
        if name not in read:
            raise ConfigError(
                f"no embedding of the model reads field {name!r}: it is left out in embedding.fields, or read another way (a "
                "history that the model reads itself; the numbers of a HiformerModel, unless num_dense_tokens is None); choose "
                "another model, or permute fields instead"
            )
    return embeddings


class FieldGates:
    """Gates on the tokens of every :class:`~ctrlib.embedding.FeatureEmbedding` of a model: main, first-order, contexts.

        e_f ← g_f · e_f

    They only read :attr:`values_F`: whoever searches sets it, and no forward pass changes it. At 1 the model is as it was, at
    0 a field's token is a zero vector.

    Args:
        names: of the F fields.
        device: of the model.

    Attributes:
        values_F: [F] the gates; 1 at first.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.names = tuple(names)
        self.values_F = torch.ones(len(self.names), device=device)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Gate the fields of ``model`` while the block runs; its weights and their names stay as they are.

        Raises:
            ConfigError: see :func:`field_embeddings`.
        """
        embeddings = field_embeddings(model, self.names)
        handles = [e.register_forward_hook(partial(self._gate, self._columns(e))) for e in embeddings]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _columns(self, embedding: FeatureEmbedding) -> Tensor:
        return torch.tensor([self.names.index(name) for name in embedding.out.names], device=self.values_F.device)

    def _gate(self, columns_F: Tensor, _: nn.Module, __: tuple[Any, ...], token_BFD: Tensor) -> Tensor:
        return token_BFD * self.values_F.index_select(0, columns_F).unsqueeze(1)
