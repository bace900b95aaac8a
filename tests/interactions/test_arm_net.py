from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.arm_net import ARMNet
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.compose import Stack
from ctrlib.interactions.fm import FM
from ctrlib.schema import FieldLayout
from tests.reference import arm_net as reference

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 3)
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "softmax": {"alpha": 1.0},
    "alpha_15": {"alpha": 1.5},
    "alpha_17": {"alpha": 1.7, "learn_alpha": True},
    "scaled": {"scale": True, "key_dim": 5},
    "shared": {"bilinear": "shared", "num_heads": 1, "key_dim": 2, "scale": True},
    "one_head": {"bilinear": "none", "num_heads": 1},
    "no_gates": {"gate": "none"},
    "no_values": {"use_values": False},
    "additive": {"neuron": "additive", "norm": "none"},
}

CONTRACT: dict[str, Interaction.Config] = {
    "arm_net": ARMNet.Config(num_heads=2, num_neurons=3),
    "arm_net_15": ARMNet.Config(num_heads=2, num_neurons=3, alpha=1.5, scale=True, keep_fields=True, exponent_clip=5.0),
    "arm_net_softmax": ARMNet.Config(num_heads=2, num_neurons=3, alpha=1.0, use_values=False),
    "arm_net_bisection": ARMNet.Config(num_heads=1, num_neurons=3, alpha=1.7, bilinear="shared", key_dim=4),
    "arm_net_learn_alpha": ARMNet.Config(num_heads=1, num_neurons=3, alpha=1.7, learn_alpha=True, bilinear="none"),
    "arm_net_additive": ARMNet.Config(num_heads=2, num_neurons=3, gate="none", neuron="additive", norm="none"),
}


def arm_net(layout: FieldLayout = LAYOUT, **options: Any) -> ARMNet:
    torch.manual_seed(1)
    return ARMNet(ARMNet.Config(**{"num_heads": 2, "num_neurons": 3, **options}), layout).double().eval()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def array(p: Tensor | None) -> reference.Array | None:
    return None if p is None else p.detach().numpy()


def awake(block: ARMNet) -> ARMNet:
    """Larger weights than at the start, where all gates are alike, and a normalisation that does something."""
    for p in block.parameters():
        nn.init.normal_(p) if p.dim() else None
    if block.norm is not None:
        nn.init.normal_(block.norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(block.norm.running_var, 0.5, 2)  # type: ignore[arg-type]
    return block


def expected(block: ARMNet, x: Tensor, alpha: float, *, scale: bool = False, additive: bool = False) -> list[reference.Array]:
    parts = [array(p) for p in (block.weight, block.query, block.value)]
    gates, weights, y = reference.arm_net(x.numpy(), *parts, alpha=alpha, scale=scale, additive=additive)
    if (norm := block.norm) is not None:
        stats = [array(t) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
        y = reference.batch_norm(y, *stats)  # type: ignore[arg-type]
    return [gates, weights, y]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_the_formula(options: dict[str, Any]) -> None:
    block, x_BFD = awake(arm_net(**options)), randn(5, 4, 3)
    y_BHD, shown = block(x_BFD), block.explain(x_BFD)
    config = {"scale": options.get("scale", False), "additive": options.get("neuron") == "additive"}
    # A learned α starts at what a float32 holds of ln(α − 1).
    alpha = options.get("alpha", 2.0) if block.log_alpha is None else 1 + block.log_alpha.exp().item()
    assert alpha == pytest.approx(options.get("alpha", 2.0), abs=1e-7)
    for row in range(5):
        gates, weights, y = expected(block, x_BFD[row], alpha, **config)
        if block.query is not None:
            np.testing.assert_allclose(shown["gates"][row].detach().numpy(), gates, rtol=0, atol=1e-10)
        np.testing.assert_allclose(shown["weights"][row].detach().numpy(), weights, rtol=0, atol=1e-10)
        np.testing.assert_allclose(y_BHD[row].detach().numpy(), y, rtol=1e-10, atol=1e-10)
    assert ("gates" in shown) is (block.query is not None)
    assert y_BHD.shape == (5, block.out.num_fields, 3)


def test_softmax_in_place_of_entmax_is_noticed() -> None:
    """The mutation that the formula test must catch: dense gates."""
    block, x_BFD = awake(arm_net(alpha=2.0)), randn(5, 4, 3)
    wrong = arm_net(alpha=1.0)
    wrong.load_state_dict(block.state_dict())
    gates, _, y = expected(block, x_BFD[0], 2.0)
    assert np.abs(wrong.explain(x_BFD)["gates"][0].detach().numpy() - gates).max() > 0.05
    assert np.abs(wrong(x_BFD)[0].detach().numpy() - y).max() > 1e-3


def test_hand_case() -> None:
    """e = (ln 2, ln 3), scores (½, 0): z = (.75, .25), w = (1.5, 1), y = 2^1.5 · 3."""
    block = arm_net(FieldLayout(("a", "b"), 2), num_heads=1, num_neurons=1, norm="none")
    x_BFD = torch.tensor([[[math.log(2), 0.5], [math.log(3), 0.0]]], dtype=torch.float64)
    weights = {"weight": [[[1.0, 0.0], [0.0, 1.0]]], "query": [[[0.0, 1.0]]], "value": [[[2.0, 4.0]]]}
    block.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})
    shown = block.explain(x_BFD)
    assert shown["gates"].flatten().tolist() == pytest.approx([0.75, 0.25])
    assert shown["weights"].flatten().tolist() == pytest.approx([1.5, 1.0])
    assert block(x_BFD)[0, 0, 0].item() == pytest.approx(8.485281, abs=1e-6)


def test_jacobian_of_a_neuron() -> None:
    """Gates frozen, dy/dx_j = w_j diag(y) (eq. 4); gates off, dy/dv_j = y ⊙ x_j."""
    block, x_BFD = awake(arm_net(gate="none", norm="none")), randn(1, 4, 3)
    assert block.value is not None
    jacobian = torch.autograd.functional.jacobian(block, x_BFD)[0, :, :, 0]  # type: ignore[no-untyped-call]
    y_HD, value_HF = block(x_BFD)[0], block.value.flatten(0, 1)
    torch.testing.assert_close(jacobian, torch.einsum("hf,hd,de->hdfe", value_HF, y_HD, torch.eye(3).double()))
    block(x_BFD)[0, 1].sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(block.value.grad.flatten(0, 1)[1], x_BFD[0] @ y_HD[1].detach())  # type: ignore[union-attr]


def test_one_head_with_a_matrix_is_the_shared_matrix() -> None:
    block, x_BFD = awake(arm_net(num_heads=1, key_dim=2)), randn(5, 4, 3)
    shared = arm_net(num_heads=1, key_dim=2, bilinear="shared")
    shared.load_state_dict(block.state_dict())
    assert torch.equal(shared(x_BFD), block(x_BFD))
    plain = arm_net(num_heads=1, bilinear="none")
    identity = {**block.state_dict(), "weight": torch.eye(3)[None], "query": plain.query, "value": plain.value}
    same = arm_net(num_heads=1)
    same.load_state_dict(identity)
    plain.load_state_dict({name: w for name, w in identity.items() if name != "weight"})
    torch.testing.assert_close(plain(x_BFD), same(x_BFD), rtol=0, atol=1e-12)


def test_order_of_fields_and_neurons_does_not_matter() -> None:
    block, x_BFD, order, neurons = awake(arm_net()), randn(5, 4, 3), [2, 0, 3, 1], [2, 0, 1]
    y_BHD = block(x_BFD)
    assert block.query is not None
    assert block.value is not None
    block.value.data = block.value.data[:, :, order]
    torch.testing.assert_close(block(x_BFD[:, order]), y_BHD, rtol=0, atol=1e-10)
    block.value.data = block.value.data[:, neurons]
    block.query.data = block.query.data[:, neurons]
    block.norm = None
    unnormed = arm_net(norm="none")
    unnormed.load_state_dict(block.state_dict())
    permuted = unnormed(x_BFD[:, order]).view(5, 2, 3, 3)
    unnormed.query.data = unnormed.query.data[:, [1, 2, 0]]  # type: ignore[union-attr]
    unnormed.value.data = unnormed.value.data[:, [1, 2, 0]]  # type: ignore[union-attr]
    torch.testing.assert_close(unnormed(x_BFD[:, order]).view(5, 2, 3, 3)[:, :, neurons], permuted, rtol=0, atol=1e-10)


def test_without_values_every_neuron_is_one() -> None:
    block = arm_net(norm="none")
    assert block.value is not None
    nn.init.zeros_(block.value)
    assert torch.equal(block(randn(5, 4, 3)), torch.ones(5, 6, 3, dtype=torch.float64))


def test_a_field_with_a_gate_of_zero_gets_no_gradient() -> None:
    block, x_BFD = awake(arm_net(num_heads=1, num_neurons=1, norm="none", alpha=3.0)), 3 * randn(20, 4, 3)
    gates_BF = block.explain(x_BFD)["gates"][:, 0]
    x_BFD.requires_grad_()
    block(x_BFD).sum().backward()  # type: ignore[no-untyped-call]
    assert x_BFD.grad is not None
    assert (gates_BF == 0).any()
    assert not x_BFD.grad[gates_BF == 0].any()
    assert x_BFD.grad[gates_BF > 0].any(dim=-1).all()


def test_norm_has_a_channel_per_neuron() -> None:
    block, x_BFD = awake(arm_net(norm="batch")).train(), randn(8, 4, 3)
    plain = arm_net(norm="none")
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("norm")})
    y_BHD, norm = plain(x_BFD), block.norm
    assert norm is not None
    mean_H, variance_H = y_BHD.mean(dim=(0, 2)), y_BHD.var(dim=(0, 2), correction=0)
    expected = (y_BHD - mean_H[:, None]) / (variance_H[:, None] + 1e-5).sqrt() * norm.weight[:, None] + norm.bias[:, None]
    torch.testing.assert_close(block(x_BFD), expected, rtol=0, atol=1e-10)


def test_input_is_left_alone_and_kept_where_asked() -> None:
    x_BFD = randn(5, 4, 3)
    before = x_BFD.clone()
    block, kept = arm_net(), arm_net(keep_fields=True)
    kept.load_state_dict(block.state_dict())
    assert torch.equal(kept(x_BFD), torch.cat([x_BFD, block(x_BFD)], dim=1))
    assert torch.equal(x_BFD, before)
    assert block.out == FieldLayout(("arm_0_0", "arm_0_1", "arm_0_2", "arm_1_0", "arm_1_1", "arm_1_2"), 3)
    assert kept.out == FieldLayout((*LAYOUT.names, *block.out.names), 3)
    both = Stack(Stack.Config(blocks=(ARMNet.Config(num_heads=1, num_neurons=1, keep_fields=True), FM.Config())), LAYOUT)
    assert both.double()(x_BFD).shape == (5, 1, 1)


@pytest.mark.parametrize("neuron", ["exp", "additive"])
def test_half_precision_keeps_what_the_exponential_adds_to_one(neuron: str) -> None:
    """At the start exponents are some thousandths, and the norm divides by how much their exponentials differ."""
    block, x_BFD = arm_net(neuron=neuron).float().train(), 0.1 * randn(64, 4, 3).float()
    expected_BHD = block(x_BFD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shown_BHD = block(x_BFD)
    assert (shown_BHD - expected_BHD).abs().max() < 0.05 * expected_BHD.abs().max()


def test_exponent_clip() -> None:
    block, x_BFD = awake(arm_net(norm="none")), 5 * randn(5, 4, 3)
    clipped = arm_net(norm="none", exponent_clip=1.0)
    clipped.load_state_dict(block.state_dict())
    torch.testing.assert_close(clipped(x_BFD), block(x_BFD).clamp(math.exp(-1), math.exp(1)))


def test_interaction_terms_of_two_rows() -> None:
    """Every neuron joins one set of fields per row, so the frequencies of all sets add up to the number of neurons."""
    block = awake(arm_net())
    gates_BHF = block.explain(2 * randn(2, 4, 3))["gates"]
    terms = Counter(tuple(f for f in range(4) if gates_BHF[b, h, f] > 0) for b in range(2) for h in range(6))
    assert sum(terms.values()) / 2 == 6
    assert () not in terms
    assert min(map(len, terms)) < 4


def test_start_of_the_weights() -> None:
    """The released code's bounds on Frappe: K = 8, o = 32, 10 fields of width 10; torch's fan rule for three axes."""
    layout = FieldLayout(tuple(f"f{i}" for i in range(10)), 10)
    block = ARMNet(ARMNet.Config(), layout)
    for weight, bound in ((block.weight, 0.2582), (block.query, 0.1732), (block.value, 0.1732)):
        assert weight is not None
        assert 0.98 * bound < weight.abs().max() <= bound + 1e-4
    single = ARMNet(ARMNet.Config(num_heads=1, bilinear="shared"), layout)
    for weight, bound in ((single.weight, 10**-0.5), (single.query, 1.414 * (6 / 42) ** 0.5)):
        assert weight is not None
        assert 0.9 * bound < weight.abs().max() <= bound
    # Gates start nearly even and neurons at 1: std of scores .003.
    gates = ARMNet(ARMNet.Config(norm="none"), layout).explain(0.019 * torch.randn(50, 10, 10))["gates"]
    assert (gates > 0).all()


def test_learns_which_fields_interact() -> None:
    """Label: whether fields 0 and 1 of six are equal, which neither says alone. Gates get sparse, weights settle on both."""
    torch.manual_seed(1)
    table_FVD = nn.Parameter(0.3 * torch.randn(6, 2, 4))
    block = ARMNet(ARMNet.Config(num_heads=1, num_neurons=8), FieldLayout(tuple("abcdef"), 4))
    head, fields, loss = nn.Linear(32, 1), torch.arange(6), torch.tensor(1.0)
    optimizer = torch.optim.Adam([table_FVD, *block.parameters(), *head.parameters()], lr=0.02)
    for _ in range(400):
        ids_BF = torch.randint(0, 2, (256, 6))
        logits = head(block(table_FVD[fields, ids_BF]).flatten(1)).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, (ids_BF[:, 0] == ids_BF[:, 1]).float())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    shown = block.explain(table_FVD[fields, torch.randint(0, 2, (256, 6))])
    assert loss < 0.01
    assert (shown["gates"] > 0).double().sum(-1).mean() < 4
    weights_F = shown["weights"].abs().mean((0, 1))
    assert weights_F[:2].min() > weights_F[2:].max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "ARMNet.num_heads is 0"),
        ({"num_neurons": 0}, "ARMNet.num_neurons is 0"),
        ({"key_dim": 0}, "ARMNet.key_dim is 0"),
        ({"exponent_clip": 0.0}, "ARMNet.exponent_clip is 0"),
        ({"alpha": 0.5}, "ARMNet.alpha is 0.5"),
        ({"alpha": math.nan}, "ARMNet.alpha is nan"),
        ({"bilinear": "shared"}, "ARMNet.num_heads is 8 with bilinear='shared'"),
        ({"bilinear": "none", "num_heads": 1, "key_dim": 3}, "ARMNet.key_dim is 3 but bilinear is 'none'"),
        ({"alpha": 1.0, "learn_alpha": True}, "ARMNet.learn_alpha needs"),
        ({"gate": "none", "learn_alpha": True}, "ARMNet.learn_alpha needs"),
        ({"gate": "none", "use_values": False}, "nothing weighs the fields"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ARMNet.Config(**options)
