from __future__ import annotations

import numpy as np
import pytest
import torch
from entmax import entmax15, entmax_bisect, sparsemax
from torch import Tensor

from ctrlib.interactions.entmax import entmax
from tests.reference.arm_net import entmax as reference
from tests.reference.arm_net import nearest_on_simplex

ALPHAS = [1.0, 1.2, 1.5, 1.7, 2.0, 2.5, 3.0]
every_alpha = pytest.mark.parametrize("alpha", ALPHAS)


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@every_alpha
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_equals_the_definition(alpha: float, dim: int) -> None:
    z = randn(5, 6, 7, scale=2)
    expected = np.apply_along_axis(reference, dim, z.numpy(), alpha)
    np.testing.assert_allclose(entmax(z, alpha, dim).numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("z", "alpha", "expected"),
    [
        ((0.5, 0.0), 1.5, (0.673993, 0.326007)),
        ((0.5, 0.0), 1.7, (0.700816, 0.299184)),
        ((0.5, 0.0), 2.0, (0.75, 0.25)),
        ((0.5, 0.0), 3.0, (1.0, 0.0)),
        ((1.0, 0.0), 1.5, (0.830719, 0.169281)),
        ((1.0, 0.0), 1.7, (0.885966, 0.114034)),
        ((1.0, 0.0), 2.0, (1.0, 0.0)),
    ],
)
def test_published_values(z: tuple[float, ...], alpha: float, expected: tuple[float, ...]) -> None:
    for dtype in (torch.float32, torch.float64):
        assert entmax(torch.tensor(z, dtype=dtype), alpha).tolist() == pytest.approx(expected, abs=1e-6)


def test_closed_forms_of_two_scores() -> None:
    for gap in (0.0, 0.3, 0.7, 1.0, 1.9, 2.5):
        z, t = torch.tensor([gap, 0.0], dtype=torch.float64), gap / 2
        assert entmax(z, 2.0)[0].item() == pytest.approx(min(1, (1 + gap) / 2), abs=1e-12)
        assert entmax(z, 1.5)[0].item() == pytest.approx(((t + (2 - t**2) ** 0.5) / 2) ** 2 if t < 1 else 1, abs=1e-12)


def test_sparsemax_is_the_projection_on_the_simplex() -> None:
    for z in randn(20, 4, scale=1.5):
        np.testing.assert_allclose(entmax(z, 2.0).numpy(), nearest_on_simplex(z.numpy()), rtol=0, atol=1e-12)


def test_equals_the_package() -> None:
    z = randn(50, 9)
    torch.testing.assert_close(entmax(z, 1.5), entmax15(z, dim=-1), rtol=0, atol=1e-14)
    torch.testing.assert_close(entmax(z, 2.0), sparsemax(z, dim=-1), rtol=0, atol=1e-14)
    for alpha in (1.2, 1.5, 1.7, 2.0, 3.0):
        torch.testing.assert_close(entmax(z, alpha), entmax_bisect(z, alpha, dim=-1, n_iter=100), rtol=0, atol=1e-12)


@every_alpha
def test_distribution_that_ignores_shifts_and_follows_permutations(alpha: float) -> None:
    z = randn(30, 8)
    p = entmax(z, alpha)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(30, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(entmax(z + 7, alpha), p, rtol=0, atol=1e-10)
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    torch.testing.assert_close(entmax(z[:, order], alpha), p[:, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(entmax(torch.full((2, 5), 0.3), alpha), torch.full((2, 5), 0.2))


@pytest.mark.parametrize("alpha", [1.5, 1.7, 2.0, 3.0])
def test_one_hot_from_a_gap_of_one_over_alpha_minus_one(alpha: float) -> None:
    for gap, one_hot in ((1 / (alpha - 1) + 1e-3, True), (1 / (alpha - 1) - 1e-3, False)):
        p = entmax(torch.tensor([gap, 0.0, -0.5], dtype=torch.float64), alpha)
        assert (p[0].item() == 1) is one_hot


@every_alpha
def test_gradients(alpha: float) -> None:
    z = randn(4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: entmax(z, alpha), (z,), eps=1e-6, atol=1e-5)


def test_gradient_of_alpha() -> None:
    z, alpha = randn(4, 5), torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: entmax(z, a), (alpha,), eps=1e-6, atol=1e-5)
    torch.testing.assert_close(entmax(z, alpha), entmax(z, 1.7), rtol=0, atol=1e-12)


@every_alpha
def test_minus_infinity_takes_no_part(alpha: float) -> None:
    z = torch.tensor([[0.3, -torch.inf, 0.1, 0.6], [-torch.inf] * 4], dtype=torch.float64, requires_grad=True)
    p = entmax(z, alpha)
    torch.testing.assert_close(p[0, [0, 2, 3]], entmax(z[0, [0, 2, 3]], alpha), rtol=0, atol=1e-12)
    assert p[0, 1] == 0
    assert not p[1].any()
    (p * torch.tensor([1.0, 2, 3, 4])).sum().backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert not z.grad[1].any()
    assert z.grad[0, 1] == 0


@every_alpha
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(alpha: float, dtype: torch.dtype) -> None:
    z = randn(20, 8).to(dtype)
    p = entmax(z, alpha)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p, entmax(z.float(), alpha), rtol=0, atol=0)
    torch.testing.assert_close(p.sum(-1), torch.ones(20), rtol=0, atol=1e-6)


def test_sparser_as_alpha_grows_and_softmax_at_one() -> None:
    z = randn(2000, 10)
    support = [(entmax(z, alpha) > 1e-9).sum(-1).double().mean().item() for alpha in (1.2, 1.5, 1.7, 2.0, 2.5, 3.0)]
    assert support == pytest.approx([9.94, 5.05, 3.44, 2.46, 1.87, 1.63], abs=0.1)
    z = torch.tensor([0.9, 0.3, -0.2, -1.0], dtype=torch.float64)
    for alpha, difference in ((1.0001, 3.1e-5), (1.01, 3.1e-3), (1.1, 3.2e-2)):
        assert (entmax(z, alpha) - z.softmax(-1)).abs().max().item() == pytest.approx(difference, rel=0.05)
