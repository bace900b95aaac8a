"""One pass over training batches with several optimizers: what the searches share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ctrlib.batch import Output
from ctrlib.losses import total_loss
from ctrlib.progress import track
from ctrlib.training import Batches, Precision, TrainingDivergedError

_CHECK_EVERY = 50  # steps between reads of the losses: each read waits for the device


class Stepper(Protocol):
    """What :class:`ctrlib.optim.Optimizer`, ``torch.optim`` optimizers and a search's own have in common."""

    def zero_grad(self) -> None: ...

    def step(self) -> object: ...


def train_pass(
    model: nn.Module,
    batches: Batches,
    optimizers: Sequence[Stepper],
    *,
    title: str,
    precision: Precision = "fp32",
    before_step: Callable[[], None] | None = None,
) -> float:
    """Train on every batch once; all optimizers step on the same gradient. Returns the mean loss, auxiliary losses included.

    Args:
        model: ``Batch → Output``, on the device where it is to be trained.
        batches: of training rows.
        optimizers: of disjoint parameters.
        title: before the progress bar and in errors.
        precision: of the forward pass, as in :class:`~ctrlib.training.FitConfig`.
        before_step: called before every training step, and never by an evaluation: where a search moves its clock.

    Raises:
        TrainingDivergedError: a loss is not finite, or a weight after the last step.
    """
    device = next(p.device for p in model.parameters())
    model.train()
    losses: list[float] = []
    pending: list[Tensor] = []

    def read() -> None:
        before = len(losses)
        losses.extend(torch.stack(pending).tolist() if pending else [])
        pending.clear()
        for step, loss in enumerate(losses[before:], before + 1):
            if not math.isfinite(loss):
                raise TrainingDivergedError(
                    f"{title} diverged: the loss of step {step} is {loss}; expected a finite number. Lower the learning rates, "
                    "and check numeric columns for very large values"
                )

    with track(title, len(batches), "batches") as tracker:
        for batch in batches:
            if before_step is not None:
                before_step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            moved = batch if batch.sparse.device == device else batch.to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                output: Output = model(moved)
            loss = total_loss(output, moved)
            torch.autograd.backward(loss)
            for optimizer in optimizers:
                optimizer.step()
            pending.append(loss.detach())
            if len(pending) == _CHECK_EVERY:
                read()
                tracker.advance(_CHECK_EVERY, f"loss {losses[-1]:.5f}")
        tracker.advance(len(pending))
        read()
    # what the last step did shows in no loss
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        raise TrainingDivergedError(
            f"{title} diverged: a weight is not finite after step {len(losses)}; expected finite numbers. Lower the learning "
            "rates, and check numeric columns for very large values"
        )
    return math.fsum(losses) / len(losses)
