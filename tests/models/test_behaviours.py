"""Building blocks of models of behaviours: against formulas with the inputs side by side, against padded blocks, by hand."""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.dice import Dice
from ctrlib.interactions.mlp import MLP
from ctrlib.models.behaviours import ActivationUnit, Steps, TargetAttention
from ctrlib.ragged import segment_ids
from ctrlib.schema import FieldLayout
from tests.reference import behaviours as reference
from tests.reference.mlp import Layers

Array = npt.NDArray[np.float64]


def steps(lengths: list[int], width: int, seed: int = 0) -> Steps:
    """Random behaviours in float64."""
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    h_NW = torch.randn(sum(lengths), width, generator=g, dtype=torch.float64)
    return Steps(h_NW, offsets, segment_ids(offsets, len(h_NW)), torch.ones(len(h_NW), dtype=torch.bool))


def layers(unit: ActivationUnit) -> Layers:
    linears = [m for m in unit.modules() if isinstance(m, nn.Linear)]
    weights = [m.weight.detach().double().numpy() for m in linears]
    return [(w, None if m.bias is None else m.bias.detach().double().numpy()) for w, m in zip(weights, linears, strict=True)]


def unit(hidden: tuple[int, ...], activation: Any, width: int, outputs: int) -> ActivationUnit:
    torch.manual_seed(1)
    return ActivationUnit(ActivationUnit.Config(hidden_units=hidden, activation=activation), width, outputs).double().eval()


def attention(norm: Any, width: int = 3, scale: bool = False) -> TargetAttention:
    torch.manual_seed(2)
    config = TargetAttention.Config(unit=ActivationUnit.Config(hidden_units=(6, 4), activation="tanh"), norm=norm, scale=scale)
    return TargetAttention(config, width).double().eval()


@pytest.mark.parametrize(("hidden", "activation"), [((), "relu"), ((5,), "relu"), ((7, 4), "sigmoid"), ((7, 4), "silu")])
def test_the_fused_unit_is_that_of_the_concatenation(hidden: tuple[int, ...], activation: Any) -> None:
    m, s = unit(hidden, activation, 3, 2), steps([2, 0, 4], 3)
    c_BW = torch.randn(3, 3, dtype=torch.float64)
    shown = m(s.h_NW, c_BW, s.row_N).detach().numpy()
    expected = [
        reference.unit(h.numpy(), c_BW[b].numpy(), layers(m), activation) for h, b in zip(s.h_NW, s.row_N.tolist(), strict=True)
    ]
    np.testing.assert_allclose(shown, expected, rtol=0, atol=1e-12)


def test_a_unit_has_the_parameters_of_four_inputs_side_by_side() -> None:
    for width, (first, second), outputs in ((3, (5, 4), 2), (32, (80, 40), 1)):
        expected = 4 * width * first + first + first * second + second + second * outputs + outputs
        assert sum(p.numel() for p in unit((first, second), "relu", width, outputs).parameters()) == expected
        learned = sum(p.numel() for p in unit((first, second), "dice", width, outputs).parameters())
        assert learned == expected + first + second


def test_dice_is_the_formula_over_the_rows_of_a_batch() -> None:
    torch.manual_seed(3)
    dice = Dice(2).double()
    nn.init.normal_(dice.alpha)
    s_NU = 2 * torch.randn(7, 2, dtype=torch.float64) + 1
    expected = [reference.dice(s_NU[:, u].numpy(), dice.alpha[u].item(), 1e-8) for u in range(2)]
    np.testing.assert_allclose(dice(s_NU).detach().numpy().T, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(dice.mean, 0.1 * s_NU.mean(0))
    torch.testing.assert_close(dice.variance, 0.9 + 0.1 * s_NU.var(0))
    dice.eval()
    alone = dice(s_NU)
    torch.testing.assert_close(dice(s_NU[:1]), alone[:1])  # the other rows do not count any more


def test_dice_trains_on_batches_with_one_behaviour_or_none() -> None:
    dice = Dice(2)
    before = dice.mean.clone(), dice.variance.clone()
    for count in (0, 1):
        assert dice(torch.ones(count, 2)).shape == (count, 2)
    assert torch.equal(dice.mean, before[0])
    assert torch.equal(dice.variance, before[1])


@pytest.mark.parametrize("activation", ["dice", "prelu"])
def test_learned_activations_are_those_of_mlps_too(activation: Any) -> None:
    block = MLP(MLP.Config(hidden_units=(5, 4), activation=activation), FieldLayout(("a", "b"), 3))
    kinds = {"dice": Dice, "prelu": nn.PReLU}
    assert [type(m) for m in block.layers] == [nn.Linear, kinds[activation]] * 2
    assert block(torch.randn(6, 2, 3)).shape == (6, 1, 4)


def test_pooling_by_hand() -> None:
    s = steps([2, 0, 4], 1)
    s = Steps(torch.tensor([[1.0], [2], [3], [4], [5], [6]]), s.offsets_B1, s.row_N, torch.tensor([1, 1, 1, 0, 1, 1]) > 0)
    assert s.count().tolist() == [2, 0, 3]
    assert s.pool(s.h_NW).tolist() == [[3], [0], [14]]
    assert s.pool(s.h_NW, torch.tensor([1.0, -1, 0, 9, 1, 2])).tolist() == [[-1], [0], [17]]
    torch.testing.assert_close(s.pool(s.h_NW, how="mean"), torch.tensor([[1.5], [0], [14 / 3]]))
    torch.testing.assert_close(s.pool(s.h_NW, how="sqrt"), torch.tensor([[3 / 2**0.5], [0], [14 / 3**0.5]]))
    kept = s.kept(torch.tensor([0, 1, 0, 1, 0, 1]) > 0)
    assert kept.count().tolist() == [1, 0, 1]
    assert kept.pool(s.h_NW, how="mean").tolist() == [[2], [0], [6]]


def test_the_recent_ones_by_hand() -> None:
    s = steps([2, 0, 4], 1)
    h_NW = torch.tensor([[1.0], [2], [3], [4], [5], [6]])
    s = Steps(h_NW, s.offsets_B1, s.row_N, torch.tensor([1, 1, 1, 0, 1, 1]) > 0)
    for expected in ([[2.0], [0.0], [6.0]], [[2.0, 1, 0], [0.0, 0, 0], [6.0, 5, 3]]):
        block_BLW, there_BL = s.recent(h_NW, len(expected[0]))
        assert block_BLW.squeeze(2).tolist() == expected
        assert there_BL.tolist() == [[v > 0 for v in row] for row in expected]
    none = steps([0, 0], 2)
    assert none.recent(none.h_NW, 3)[0].tolist() == [[[0.0, 0.0]] * 3] * 2


@pytest.mark.parametrize("norm", ["none", "softmax", "sigmoid"])
def test_attention_is_the_formula_row_by_row(norm: str) -> None:
    m, lengths = attention(norm), [3, 0, 1, 2]
    s = steps(lengths, 3)
    c_BW = torch.randn(4, 3, dtype=torch.float64)
    parts = torch.split(s.h_NW, lengths)
    expected = [reference.attend(h.numpy(), c.numpy(), layers(m.unit), "tanh", norm) for h, c in zip(parts, c_BW, strict=True)]
    np.testing.assert_allclose(m(s, c_BW).detach().numpy(), expected, rtol=0, atol=1e-12)
    assert not m(s, c_BW)[1].any()


def test_scaled_scores() -> None:
    s, c_BW = steps([3, 2], 3), torch.randn(2, 3, dtype=torch.float64)
    plain, scaled = attention("softmax"), attention("softmax", scale=True)
    torch.testing.assert_close(scaled.scores(s, c_BW), plain.scores(s, c_BW) / 3**0.5)


@pytest.mark.parametrize("norm", ["none", "softmax", "sigmoid"])
def test_padding_is_not_read_whatever_its_vectors_are(norm: str) -> None:
    """Released code's softmax over padding alone is the mean of the padding; here such rows have a zero vector."""
    m, lengths = attention(norm), [3, 0, 1, 2]
    s, c_BW = steps(lengths, 3), torch.randn(4, 3, dtype=torch.float64)
    huge = 1e6 * torch.randn(4, 2, 3, dtype=torch.float64)
    parts = [torch.cat([huge[b, :1], h, huge[b, 1:]]) for b, h in enumerate(torch.split(s.h_NW, lengths))]
    padded = steps([n + 2 for n in lengths], 3)
    real_N = torch.cat([torch.tensor([False, *[True] * n, False]) for n in lengths])
    padded = Steps(torch.cat(parts), padded.offsets_B1, padded.row_N, real_N)
    torch.testing.assert_close(m(padded, c_BW), m(s, c_BW), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["none", "softmax"])
def test_the_order_of_behaviours_does_not_matter(norm: str) -> None:
    m, s = attention(norm), steps([3, 0, 4], 3)
    c_BW = torch.randn(3, 3, dtype=torch.float64)
    order = [2, 0, 1, 6, 4, 5, 3]
    torch.testing.assert_close(m(s.replaced(s.h_NW[order]), c_BW), m(s, c_BW), rtol=0, atol=1e-12)


def as_padded(m: TargetAttention, s: Steps, c_BW: Tensor) -> Tensor:
    """The same attention on a block [B, L, W] with everything side by side, as other libraries do."""
    lengths = s.offsets_B1.diff().tolist()
    longest = max(lengths)
    parts = [torch.cat([h, h.new_zeros(longest - len(h), h.shape[1])]) for h in torch.split(s.h_NW, lengths)]
    h_BLW, there_BL = torch.stack(parts), torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    c_BLW = c_BW.unsqueeze(1).expand_as(h_BLW)
    x = m.unit.first(torch.cat([h_BLW, c_BLW, h_BLW - c_BLW, h_BLW * c_BLW], dim=2))
    score_BL = cast(Tensor, m.unit.rest(x)).squeeze(2)
    if m.norm == "softmax":
        score_BL = score_BL.masked_fill(~there_BL, -torch.inf).softmax(1).nan_to_num()
    return (torch.where(there_BL, score_BL, 0.0).unsqueeze(2) * h_BLW).sum(1)


@pytest.mark.parametrize("norm", ["none", "softmax"])
def test_ragged_is_padded(norm: str) -> None:
    m = attention(norm).float()
    s = steps([5, 0, 1, 17, 3], 3)
    s = s.replaced(s.h_NW.float())
    c_BW = torch.randn(5, 3)
    torch.testing.assert_close(m(s, c_BW), as_padded(m, s, c_BW), rtol=0, atol=1e-6)


def saved_numbers(run: Any) -> int:
    """How many numbers the forward pass keeps for the backward pass; a tensor that is kept several times counts once."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run().sum()
    return sum(kept.values())


def test_memory_is_in_proportion_to_the_behaviours() -> None:
    m = attention("none", width=8).float()
    even, uneven = steps([16] * 64, 8), steps([1024 - 63] + [1] * 63, 8)
    c_BW = torch.randn(64, 8)
    numbers = [saved_numbers(lambda s=s: m(s.replaced(s.h_NW.float().requires_grad_()), c_BW)) for s in (even, uneven)]
    padded = saved_numbers(lambda: as_padded(m, uneven.replaced(uneven.h_NW.float().requires_grad_()), c_BW))
    assert numbers[0] == pytest.approx(numbers[1], rel=0.05)
    assert padded > 20 * numbers[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivationUnit.Config(hidden_units=(4, 0)), "ActivationUnit.hidden_units is 0"),
        (lambda: ActivationUnit.Config(activation=cast(Literal["dice"], "dise")), "'dise'.*did you mean 'dice'"),
        (lambda: TargetAttention.Config(norm=cast(Literal["none"], "softmaxx")), "'softmaxx'.*did you mean 'softmax'"),
    ],
)
def test_options(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
