"""AutoField: which fields a model needs, learned together with the model (Wang et al., WWW 2022, arXiv:2204.09078)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctrlib.batch import Batch
from ctrlib.config import ConfigError, positive, to_json
from ctrlib.data.loader import Loader
from ctrlib.data.memory import half_of_free_mb
from ctrlib.data.store import Store
from ctrlib.losses import total_loss
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.optim import build_optimizer
from ctrlib.schema import DataError
from ctrlib.search.field_gates import FieldGates
from ctrlib.search.passes import train_pass
from ctrlib.search.ranking import Top, best_fields, check_top, number_to_keep
from ctrlib.search.selection import Selection
from ctrlib.training import FitConfig, TrainingDivergedError, seed_everything

_log = logging.getLogger("ctrlib")


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoFieldConfig:
    """
    Args:
        top: fields to keep, as a number or a share.
        epochs: passes over the training rows.
        learning_rate: of the field logits (Adam).
        update_every: steps of the weights between two of the field logits.
        arch_share: of the training rows, on which the field logits learn and the weights do not.
        temperature: τ at the first step.
        temperature_step: by which τ falls with every step of the weights.
        min_temperature: where it stops.
    """

    top: Top
    epochs: int = 1
    learning_rate: float = 1e-3
    update_every: int = 10
    arch_share: float = 0.2
    temperature: float = 1.0
    temperature_step: float = 5e-5
    min_temperature: float = 0.01

    def __post_init__(self) -> None:
        check_top("auto_field.top", self.top)
        positive("auto_field.epochs", self.epochs)
        positive("auto_field.learning_rate", self.learning_rate)
        positive("auto_field.update_every", self.update_every)
        positive("auto_field.min_temperature", self.min_temperature)
        if not 0 < self.arch_share < 1:
            raise ConfigError(f"auto_field.arch_share is {self.arch_share}; expected a share of the rows between 0 and 1")
        if self.temperature < self.min_temperature or self.temperature_step < 0:
            raise ConfigError(
                f"auto_field.temperature is {self.temperature}, falling by {self.temperature_step} a step to "
                f"{self.min_temperature}; expected a temperature that does not rise"
            )

    def temperature_at(self, step: int) -> float:
        """τ when the weights have taken so many steps."""
        return max(self.temperature - self.temperature_step * step, self.min_temperature)


def search_auto_field(
    model: ModelComponent.Config,
    store: Store,
    config: AutoFieldConfig,
    *,
    fit: FitConfig,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Selection:
    """Give every field two logits a_f (keep, drop), learn them beside the weights, and keep the fields most worth keeping.

        gate_f = softmax((a_f + Gumbel noise) / τ)_keep,   e_f ← gate_f · e_f,   score_f = softmax(a_f)_keep

    Gates are drawn anew in every step and shared by its rows. The weights W learn on one part of the training rows; every
    ``update_every`` steps the logits take a step on the other part, with W as it is (first order):

        W ← W − η ∂L_train(W, a)/∂W,   a ← a − ξ ∂L_arch(W, a)/∂a

    τ falls with the steps of W alone. Re-train on ``fields`` from scratch.

    Args:
        model: any; its fields are read through :class:`~ctrlib.embedding.FeatureEmbedding`.
        store: of which only the training rows are read.
        config: see :class:`AutoFieldConfig`.
        fit: its ``optimizer`` and ``precision`` are those of the weights; the rest is for re-training.
        batch_size: of both parts of the rows.
        seed: of weights, noise, order of rows and their two parts.
        device: where the model is trained.

    Raises:
        ConfigError: ``top`` larger than the number of fields.
        DataError: too few training rows for two parts.
        TrainingDivergedError: a loss is not finite.
    """
    # NOTE[DIFF] the paper updates the logits on validation rows, which then could neither stop nor compare what follows
    # NOTE[DIFF] released ports move τ in every forward pass, also of evaluations; here it is moved by the loop, once a step
    started = time.perf_counter()
    number_to_keep(store.encoder.schema, config.top)  # too many should not come out only after training
    seed_everything(seed)
    layout, split = store.encoder.layout, store.split("train")
    weight_rows, arch_rows = _two_parts(split.num_rows, config.arch_share, seed)
    memory_mb = half_of_free_mb() / 2  # for each of the two
    rows = Loader(split, batch_size, shuffle=True, seed=seed, memory_mb=memory_mb, rows=weight_rows)
    arch = _endless(Loader(split, batch_size, shuffle=True, seed=seed, memory_mb=memory_mb, rows=arch_rows))
    built = build_model(model, layout).to(device)
    controller = _Controller(built, layout.names, arch, config)
    optimizer = build_optimizer(built, fit.optimizer)
    epochs: list[dict[str, Any]] = []
    try:
        with controller.gates.on(built):
            for epoch in range(config.epochs):
                title = f"auto_field {epoch + 1}/{config.epochs}"
                loss = train_pass(
                    built, rows, [optimizer], title=title, precision=fit.precision, before_step=controller.advance
                )
                epochs.append({"loss": loss, "keep": controller.scores(), "temperature": controller.temperature})
    finally:
        optimizer.close()
        arch.close()
    scores = controller.scores()
    kept = best_fields(store.encoder.schema, scores, config.top)
    _log.info("auto_field keeps %d of %d fields", len(kept), len(scores))
    report = {
        "settings": to_json(config),
        "steps": controller.steps,
        "arch_steps": controller.updates,
        "rows": {"weights": len(weight_rows), "arch": len(arch_rows)},
        "epochs": epochs,
        "seconds": time.perf_counter() - started,
    }
    return Selection(method="autofield", encoder_hash=store.encoder.hash, fields=kept, scores=scores, report=report)


class _Controller:
    """The field logits, their clock and their optimizer."""

    def __init__(
        self, model: ModelComponent, names: tuple[str, ...], batches: Iterator[Batch], config: AutoFieldConfig
    ) -> None:
        self._model, self._batches, self._config = model, batches, config
        self.device = next(model.parameters()).device
        self.gates = FieldGates(names, self.device)
        self.logits_F2 = torch.zeros(len(names), 2, device=self.device, requires_grad=True)
        self._optimizer = torch.optim.Adam([self.logits_F2], lr=config.learning_rate)
        self.steps, self.updates = 0, 0
        self.temperature = config.temperature_at(0)

    def advance(self) -> None:
        """Before every step of the weights: the clock, the logits' own step when it is due, gates for the weights."""
        self.temperature = self._config.temperature_at(self.steps)
        if self.steps and self.steps % self._config.update_every == 0:
            self._update(next(self._batches).to(self.device))
        self.gates.values_F = self._draw().detach()
        self.steps += 1

    def _update(self, batch: Batch) -> None:
        self.gates.values_F = self._draw()
        loss = total_loss(self._model(batch), batch)
        (grad_F2,) = torch.autograd.grad(loss, [self.logits_F2])
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingDivergedError(
                f"auto_field diverged: the loss of step {self.updates + 1} of the field logits is {value}; expected a finite "
                "number. Lower the learning rates"
            )
        self.logits_F2.grad = grad_F2
        self._optimizer.step()
        self.updates += 1

    def _draw(self) -> Tensor:
        return F.gumbel_softmax(self.logits_F2, tau=self.temperature, dim=1)[:, 0]

    def scores(self) -> dict[str, float]:
        """By field: the chance that it is kept, without noise."""
        keep_F = self.logits_F2.detach().softmax(dim=1)[:, 0]
        return dict(zip(self.gates.names, keep_F.tolist(), strict=True))


def _two_parts(num_rows: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the rows for the weights, and of a random ``share`` for the field logits."""
    count = round(num_rows * share)
    if not 2 <= count <= num_rows - 2:  # a batch of one row has no statistics
        raise DataError(
            f"{num_rows} training rows cannot be parted at {share}; expected two or more for the field logits and for the "
            "weights each: give more rows or another auto_field.arch_share"
        )
    dtype = torch.int32 if num_rows < 2**31 else torch.int64  # the same permutation in half the memory
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return order[count:].sort().values, order[:count].sort().values


def _endless(batches: Loader) -> Generator[Batch, None, None]:
    while True:
        yield from batches
