from __future__ import annotations

import numpy as np
import torch

from ctrlib.interactions.base import Interaction
from ctrlib.interactions.fm import FM
from ctrlib.schema import FieldLayout
from tests.reference.fm import fm

CONTRACT: dict[str, Interaction.Config] = {
    "fm": FM.Config(),
}
DERIVED = {"fm": {"pair"}}  # forward has Rendle's lemma


def test_hand_case() -> None:
    """⟨(1,2),(3,4)⟩ + ⟨(1,2),(5,6)⟩ + ⟨(3,4),(5,6)⟩ = 11 + 17 + 39."""
    block = FM(FM.Config(), FieldLayout(("a", "b", "c"), 2))
    assert block(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])).tolist() == [[[67.0]]]


def test_equals_the_double_sum() -> None:
    layout = FieldLayout(tuple("abcdefg"), 5)
    block = FM(FM.Config(), layout)
    x_BFD = torch.randn(6, 7, 5, dtype=torch.float64)
    np.testing.assert_allclose(block(x_BFD)[:, 0, 0].numpy(), [fm(x.numpy()) for x in x_BFD], rtol=0, atol=1e-10)
    assert block.out == FieldLayout(("fm",), 1)
    assert block(x_BFD).shape == (6, 1, 1)


def test_one_field_has_no_pairs() -> None:
    x_BFD = torch.randn(4, 1, 3, dtype=torch.float64)
    np.testing.assert_allclose(FM(FM.Config(), FieldLayout(("a",), 3))(x_BFD).numpy(), np.zeros((4, 1, 1)), atol=1e-12)


def test_explain_shows_the_pairs_that_add_up_to_the_logit() -> None:
    block = FM(FM.Config(), FieldLayout(("a", "b", "c"), 2))
    x_BFD = torch.tensor([[[1.0, 2.0], [3.0, -1.0], [0.0, 4.0]]])
    assert block.axes == {"pair": (("a*b", "a*c", "b*c"),)}
    assert block.explain(x_BFD)["pair"].tolist() == [[1.0, 8.0, -4.0]]
    assert block(x_BFD).item() == 5.0
