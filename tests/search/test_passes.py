"""The pass that searches share: a search does not go on from weights that are no numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ctrlib.batch import Batch, Output
from ctrlib.search.passes import train_pass
from ctrlib.training import TrainingDivergedError
from tests.models.small import rows


class Line(nn.Module):
    """The same logit for every row."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, batch: Batch) -> Output:
        return Output(self.weight.expand(len(batch)))


class Jump:
    """An optimizer whose only step, after a finite loss, leaves a weight that is no number."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def zero_grad(self) -> None:
        self.weight.grad = None

    def step(self) -> None:
        self.weight.data.fill_(float("inf"))


def test_a_loss_or_the_last_step_may_diverge() -> None:
    good = Line(0.0)
    assert train_pass(good, [rows(8)] * 3, [torch.optim.SGD(good.parameters(), lr=0.1)], title="a search") == pytest.approx(
        0.69, abs=0.05
    )
    with pytest.raises(TrainingDivergedError, match="a search diverged: the loss of step 1 is nan"):
        train_pass(Line(float("nan")), [rows(8)], [], title="a search")
    jumping = Line(0.0)
    with pytest.raises(TrainingDivergedError, match="a weight is not finite after step 1"):
        train_pass(jumping, [rows(8)], [Jump(jumping.weight)], title="a search")
