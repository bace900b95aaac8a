from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.fm import FM
from ctrlib.interactions.nfm import BiInteraction
from ctrlib.schema import FieldLayout
from tests.reference.pairs import bi_interaction

LAYOUT = FieldLayout(("user", "item", "hour"), 2)

CONTRACT: dict[str, Interaction.Config] = {
    "bi_interaction": BiInteraction.Config(),
    "bi_interaction_norm": BiInteraction.Config(norm="batch", dropout=0.2),
}


def test_equals_the_formula() -> None:
    torch.manual_seed(1)
    block, x_BFD = BiInteraction(BiInteraction.Config(), LAYOUT), torch.randn(5, 3, 2, dtype=torch.float64)
    expected = [bi_interaction(x.numpy()) for x in x_BFD]
    assert block.out == FieldLayout(("bi_interaction",), 2)
    assert block(x_BFD).shape == (5, 1, 2)
    np.testing.assert_allclose(block(x_BFD)[:, 0].numpy(), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(block(x_BFD).sum(dim=2, keepdim=True), FM(FM.Config(), LAYOUT)(x_BFD), rtol=0, atol=1e-12)


def test_hand_case() -> None:
    """(1, 2) ⊙ (3, 0) + (1, 2) ⊙ (−1, 4) + (3, 0) ⊙ (−1, 4)."""
    x_BFD = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [-1.0, 4.0]]])
    assert BiInteraction(BiInteraction.Config(), LAYOUT)(x_BFD).tolist() == [[[-1.0, 8.0]]]


def test_norm_then_dropout() -> None:
    torch.manual_seed(2)
    block, x_BFD = (
        BiInteraction(BiInteraction.Config(norm="batch", dropout=0.5), LAYOUT).double(),
        torch.randn(64, 3, 2).double(),
    )
    assert block.norm is not None
    nn.init.normal_(block.norm.weight)
    nn.init.normal_(block.norm.bias)
    plain = BiInteraction(BiInteraction.Config(), LAYOUT)(x_BFD)[:, 0]
    scaled = (plain - plain.mean(0)) / (plain.var(0, correction=0) + 1e-5).sqrt() * block.norm.weight + block.norm.bias
    y_BD = block(x_BFD)[:, 0]
    kept = y_BD != 0
    assert 0.3 < kept.double().mean() < 0.7
    torch.testing.assert_close(y_BD[kept], 2 * scaled[kept])
    assert sum(p.numel() for p in block.parameters()) == 4


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"BiInteraction\.dropout is 1"):
        BiInteraction.Config(dropout=1.0)
