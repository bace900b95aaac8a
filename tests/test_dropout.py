"""Dropout: the chance, independence, the mean, the gradient, one seed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctrlib.dropout import Dropout, dropout


@pytest.mark.parametrize("p", [0.003, 0.1, 0.5, 0.9])
def test_elements_are_dropped_with_their_chance(p: float) -> None:
    torch.manual_seed(0)
    n = 2_000_000
    y = dropout(torch.ones(n), p)
    share = float((y == 0).double().mean())
    assert abs(share - p) < 5 * (p * (1 - p) / n) ** 0.5 + 2**-17
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)), rtol=2e-4, atol=0)
    assert abs(float(y.double().mean()) - 1) < 5 * (p / (1 - p) / n) ** 0.5


def test_neighbours_are_dropped_independently() -> None:
    """Four elements share a random number: no pair of their four parts may go together, nor may numbers in a row."""
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(1_000_000, 4), 0.3) == 0).double()
    every = torch.cat([dropped[:-1], dropped[1:]], dim=1)
    torch.testing.assert_close(torch.corrcoef(every.T), torch.eye(8, dtype=torch.float64), rtol=0, atol=0.005)
    torch.testing.assert_close(dropped.mean(0), torch.full((4,), 0.3, dtype=torch.float64), rtol=0, atol=0.003)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (3, 7), (2, 3, 4)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert dropout(torch.ones(shape), 0.5).shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_is_that_of_the_mask(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 30, dtype=dtype).T.requires_grad_()  # not contiguous
    y = dropout(x, 0.4)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert y.dtype == dtype
    assert x.grad is not None
    torch.testing.assert_close(
        x.grad, torch.where(y == 0, 0.0, 1 / 0.6).to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=0
    )


def test_one_seed_one_mask() -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return dropout(torch.ones(1000), 0.5)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_nothing_happens_in_evaluation_and_nothing_is_drawn() -> None:
    x = torch.randn(10)
    state = torch.get_rng_state()
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_compiled_graph_draws_as_torch_does() -> None:
    compiled = torch.compile(lambda x: dropout(x, 0.5), backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    found = compiled(torch.ones(1000))
    torch.manual_seed(0)
    assert torch.equal(found, F.dropout(torch.ones(1000), 0.5))


def test_a_chance_of_almost_one() -> None:
    x = dropout(torch.ones(1_000_000), 0.999999)
    assert x.isfinite().all()
    assert (x == 0).float().mean() > 0.9999
