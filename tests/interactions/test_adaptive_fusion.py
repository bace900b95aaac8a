from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.adaptive_fusion import AdaptiveFusion
from ctrlib.interactions.base import Interaction
from ctrlib.schema import FieldLayout
from tests.interactions.contract import Need
from tests.reference import adaptive_fusion as reference

LAYOUT = FieldLayout(("user", "age", "item", "genre"), 5)
MODALITIES = {"profile": ("user", "age")}

CONTRACT: dict[str, Interaction.Config] = {
    "adaptive_fusion": AdaptiveFusion.Config(hidden_dim=8),
    "adaptive_fusion_gates": AdaptiveFusion.Config(modalities={"place": ("city", "hour")}, hidden_dim=8),
    "adaptive_fusion_modalities": AdaptiveFusion.Config(
        modalities={"place": ("city", "hour")}, dim=4, hidden_dim=8, field_gates=False, output="modalities"
    ),
}
NEEDS: dict[str, Need] = dict.fromkeys(
    ("adaptive_fusion_gates", "adaptive_fusion_modalities"), lambda layout: {"city", "hour"} <= set(layout.names)
)


def fusion(**options: Any) -> AdaptiveFusion:
    torch.manual_seed(1)
    given: dict[str, Any] = {"modalities": MODALITIES, "dim": 3, "hidden_dim": 6} | options
    block = AdaptiveFusion(AdaptiveFusion.Config(**given), LAYOUT)
    for parameter in block.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return block.double()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()


def rows() -> Tensor:
    """Some with absent fields and modalities, one with nothing."""
    x_BFD = randn(7, 4, 5)
    x_BFD[1, 0] = 0
    x_BFD[2, :2] = 0
    x_BFD[3, 2] = 0
    x_BFD[4, 1:] = 0
    x_BFD[5] = 0
    return x_BFD


@pytest.mark.parametrize("field_gates", [True, False])
def test_equals_the_formula(field_gates: bool) -> None:
    block, split = fusion(field_gates=field_gates), fusion(field_gates=field_gates, output="modalities")
    assert block.out == FieldLayout(("adaptive_fusion",), 3)
    assert split.out == FieldLayout(("profile", "item", "genre"), 3)
    assert block.norm is not None
    x_BFD = rows()
    z_B1K, h_BAK, shown = block(x_BFD), split(x_BFD), block.explain(x_BFD)
    own = block.hidden, block.norm
    hidden, norm = ((array(m.weight), array(m.bias)) for m in own)
    for row, x in enumerate(x_BFD.numpy()):
        gamma, of = [1.0] * 4, [0, 0, 1, 2]
        if block.gates is not None:
            first, last = (m for m in block.gates if isinstance(m, nn.Linear))
            layers = [(array(m.weight), array(m.bias)) for m in (first, last)]
            gamma = reference.gates(x, of, layers[0], layers[1])
            np.testing.assert_allclose(shown["gate"][row].numpy(), gamma, rtol=0, atol=1e-10)
        weight, bias = array(block.weight_FDK), array(block.bias_AK)
        alpha, weighted, z = reference.fusion(x, gamma, of, weight, bias, hidden, array(block.score.weight), norm)
        np.testing.assert_allclose(shown["attention"][row].numpy(), alpha, rtol=0, atol=1e-10)
        np.testing.assert_allclose(array(z_B1K)[row, 0], z, rtol=0, atol=1e-10)
        np.testing.assert_allclose(array(h_BAK)[row], weighted, rtol=0, atol=1e-10)


def test_weights_sum_to_one_over_what_is_present() -> None:
    attention = fusion().explain(rows())["attention"]
    torch.testing.assert_close(attention.sum(1), torch.tensor([1, 1, 1, 1, 1, 0, 1], dtype=torch.float64))
    assert attention[[2, 3], [0, 1]].tolist() == [0, 0]
    assert attention[4].tolist() == pytest.approx([1, 0, 0])
    assert fusion()(rows()).isfinite().all()


def test_gates_have_a_mean_of_one_within_a_modality() -> None:
    """So a modality of one field has γ = 1, and a lone present field too."""
    gate = fusion().explain(rows())["gate"]
    torch.testing.assert_close(gate[0, :2].mean(), torch.tensor(1.0, dtype=torch.float64))
    assert gate[0, 0] != gate[0, 1]
    torch.testing.assert_close(gate[0, 2:], torch.ones(2, dtype=torch.float64))
    assert gate[1, :2].tolist() == pytest.approx([0, 1])
    assert not gate[5].any()
    assert list(AdaptiveFusion(AdaptiveFusion.Config(), LAYOUT).axes) == ["attention"]


def test_masking_a_field_leaves_the_weight_of_an_absent_modality_alone() -> None:
    """And what stands in the place of an absent modality cannot be read: only a token can make it present."""
    block, x_BFD = fusion(), rows()
    before = block.explain(x_BFD)["attention"]
    for f in range(4):
        masked = x_BFD.clone()
        masked[:, f] = 0
        after = block.explain(masked)["attention"]
        assert not after[before == 0].any()


def test_a_number_that_is_zero_is_there_if_it_is_said_to_be() -> None:
    """Its weight goes on through 0, where that of another field would drop to 0."""
    name = LAYOUT.names[3]
    x_BFD = randn(1, 4, 5)
    near, at = x_BFD.clone(), x_BFD.clone()
    near[:, 3] *= 1e-9
    at[:, 3] = 0
    for options, jumps in (({"never_absent": (name,)}, False), ({}, True)):
        block = fusion(modalities={}, **options)
        apart = (block.modalities(near)[1] - block.modalities(at)[1]).abs().max()
        assert bool(apart > 1e-3) == jumps


def test_gradients_are_finite_where_nothing_is_present() -> None:
    block, x_BFD = fusion(), rows().requires_grad_()
    block(x_BFD).square().sum().backward()  # type: ignore[no-untyped-call]
    assert x_BFD.grad is not None
    assert x_BFD.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_a_modality_of_noise_gets_less_than_its_share() -> None:
    """The label is read off age and item; the third modality is noise."""
    torch.manual_seed(0)
    layout = FieldLayout(("age", "job", "item", "noise"), 8)
    fused = AdaptiveFusion(AdaptiveFusion.Config(modalities={"profile": ("age", "job")}, dim=8), layout)
    net = nn.Sequential(fused, nn.Flatten(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(200):
        x_BFD = torch.randn(256, 4, 8)
        label_B = (x_BFD[:, 0, 0] + x_BFD[:, 2, 0] > 0).float()
        loss = nn.functional.binary_cross_entropy_with_logits(net(x_BFD).flatten(), label_B)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    alpha = fused.explain(torch.randn(2000, 4, 8))["attention"].mean(0)
    assert float(loss.detach()) < 0.2
    assert alpha[2] < 0.5 / 3
    assert alpha[:2].min() > 1 / 4


def test_sizes() -> None:
    block = AdaptiveFusion(AdaptiveFusion.Config(modalities=MODALITIES, dim=7, hidden_dim=6), LAYOUT)
    fields = 4 * 5 * 7 + 3 * 7
    weights = 3 * 7 * 6 + 6 + 6 * 3
    gates = (8 * 6 + 6) + (6 * 4 + 4)
    assert sum(p.numel() for p in block.parameters()) == fields + weights + gates + 2 * 7


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"modalities\.profile is empty"):
        AdaptiveFusion.Config(modalities={"profile": ()})
    with pytest.raises(ConfigError, match="field 'age' is in the modalities 'a' and 'b'"):
        AdaptiveFusion.Config(modalities={"a": ("age",), "b": ("age",)})
    with pytest.raises(ConfigError, match=r"names field 'itme', which the block does not read; did you mean 'item'"):
        AdaptiveFusion(AdaptiveFusion.Config(modalities={"content": ("itme",)}), LAYOUT)
    with pytest.raises(ConfigError, match=r"never_absent names field 'aeg', which the block does not read; did you mean 'age'"):
        AdaptiveFusion(AdaptiveFusion.Config(never_absent=("aeg",)), LAYOUT)
    with pytest.raises(ConfigError, match=r"AdaptiveFusion\.dim is 0"):
        AdaptiveFusion.Config(dim=0)
    with pytest.raises(ConfigError, match=r"AdaptiveFusion\.output is 'fields'"):
        AdaptiveFusion.Config(output="fields")  # type: ignore[arg-type]
