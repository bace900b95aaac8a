from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.afn import LogTransform
from ctrlib.interactions.base import Interaction
from ctrlib.schema import FieldLayout
from tests.reference.afn import Norm, log_transform

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 3)

CONTRACT: dict[str, Interaction.Config] = {
    "log_transform": LogTransform.Config(num_neurons=5, eps=1e-4, bias=True),
    "log_transform_plain": LogTransform.Config(num_neurons=5, eps=1e-2, norm="none"),
}
# Weights times the scale of the norm.
DERIVED = {"log_transform": {"orders"}}


def block(layout: FieldLayout = LAYOUT, **options: Any) -> LogTransform:
    torch.manual_seed(1)
    return LogTransform(LogTransform.Config(**{"num_neurons": 5, **options}), layout).double().eval()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def awake(afn: LogTransform) -> LogTransform:
    for module in afn.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    if afn.bias_L is not None:
        nn.init.normal_(afn.bias_L)
    return afn


def norm(module: nn.Module | None) -> Norm | None:
    if module is None:
        return None
    mean, variance, gain, shift = (module.get_buffer("running_mean"), module.get_buffer("running_var"), *module.parameters())
    return Norm(mean.numpy(), variance.numpy(), gain.detach().numpy(), shift.detach().numpy())


@pytest.mark.parametrize("options", [{}, {"norm": "none"}, {"bias": True, "eps": 1e-4}, {"eps": 0.5}])
def test_equals_the_formula(options: dict[str, Any]) -> None:
    afn, x_BFD = awake(block(**options)), randn(6, 4, 3)
    bias = None if afn.bias_L is None else afn.bias_L.detach().numpy()
    weight, eps = afn.orders_LF.detach().numpy(), options.get("eps", 1e-7)
    expected = [log_transform(x.numpy(), weight, bias, eps, norm(afn.norm_log), norm(afn.norm_exp)) for x in x_BFD]
    np.testing.assert_allclose(afn(x_BFD).detach().numpy(), expected, rtol=0, atol=1e-10)
    assert afn.out == FieldLayout(("log_0", "log_1", "log_2", "log_3", "log_4"), 3)


def test_hand_case() -> None:
    """Orders (2, −1) of the fields 3 and 4: 9/4; signs don't matter."""
    afn = block(FieldLayout(("a", "b"), 1), num_neurons=1, norm="none")
    afn.load_state_dict({"orders_LF": torch.tensor([[2.0, -1.0]])})
    for sign in (1, -1):
        assert afn(torch.tensor([[[3.0 * sign], [4.0]]], dtype=torch.float64)).item() == pytest.approx(2.25)


def test_norms_have_a_channel_per_field_and_per_neuron() -> None:
    afn, x_BFD = awake(block()).train(), randn(8, 4, 3)
    log_BFD = x_BFD.abs().log()
    scaled = (log_BFD - log_BFD.mean((0, 2))[:, None]) / (log_BFD.var((0, 2), correction=0)[:, None] + 1e-5).sqrt()
    gain, shift = (p[:, None] for p in afn.norm_log.parameters())  # type: ignore[union-attr]
    y_BLD = torch.einsum("lf,bfd->bld", afn.orders_LF, scaled * gain + shift).exp()
    normed = (y_BLD - y_BLD.mean((0, 2))[:, None]) / (y_BLD.var((0, 2), correction=0)[:, None] + 1e-5).sqrt()
    gain, shift = (p[:, None] for p in afn.norm_exp.parameters())  # type: ignore[union-attr]
    torch.testing.assert_close(afn(x_BFD), normed * gain + shift, rtol=0, atol=1e-9)


def test_orders_shown_are_the_powers() -> None:
    """Doubling a field multiplies every neuron by 2 to the power shown."""
    afn, x_BFD = awake(block()), randn(3, 4, 3)
    afn.norm_exp = None
    orders_BLF = afn.explain(x_BFD)["orders"]
    assert orders_BLF.shape == (3, 5, 4)
    doubled = x_BFD.clone()
    doubled[:, 2] *= 2
    torch.testing.assert_close(afn(doubled) / afn(x_BFD), (2 ** orders_BLF[:, :, 2:3]).expand(-1, -1, 3))


def test_without_the_logarithm_the_result_differs() -> None:
    """The mutation that the formula test must catch: exp of a weighted sum of the embeddings themselves."""
    afn, x_BFD = block(norm="none"), randn(3, 4, 3)
    assert (afn(x_BFD) - (afn.orders_LF @ x_BFD).exp()).abs().max() > 1e-2


def test_zero_embeddings_give_finite_gradients() -> None:
    afn, x_BFD = block(), torch.zeros(4, 4, 3, dtype=torch.float64, requires_grad=True)
    afn(x_BFD).sum().backward()  # type: ignore[no-untyped-call]
    assert x_BFD.grad is not None
    assert x_BFD.grad.isfinite().all()


def test_sizes() -> None:
    layout = FieldLayout(tuple(f"f{i}" for i in range(10)), 10)
    size = {bias: sum(p.numel() for p in block(layout, num_neurons=600, bias=bias).parameters()) for bias in (False, True)}
    assert size == {False: 6_000 + 2 * 610, True: 6_000 + 2 * 610 + 600}


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"LogTransform\.num_neurons is 0"):
        LogTransform.Config(num_neurons=0)
    with pytest.raises(ConfigError, match=r"LogTransform\.eps is 0"):
        LogTransform.Config(eps=0.0)
