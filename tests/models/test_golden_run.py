"""200 steps on synthetic data whose best possible log loss is known: a refactor must reproduce the losses stored here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ctrlib.batch import Batch
from ctrlib.config import override
from ctrlib.data.encoder import Encoder
from ctrlib.data.synthetic import CriteoLike
from ctrlib.losses import total_loss
from ctrlib.metrics import log_loss
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.schema import BatchLayout, DenseField, Schema, SparseField

STEPS, BATCH_SIZE, TEST_ROWS = 200, 512, 20_000
NUMBERS = ("I3", "I6", "I7", "I11", "I13")
CATEGORIES = ("C2", "C5", "C6", "C8", "C9", "C14", "C17", "C20", "C22", "C23", "C25")
# Training loss at steps 20, 40, ..., 200.
GOLDEN = (0.504531, 0.46888, 0.517593, 0.469135, 0.444245, 0.438316, 0.439765, 0.440625, 0.45755, 0.445106)


@dataclass(frozen=True)
class Data:
    layout: BatchLayout
    train: list[Batch]
    test: Batch
    bayes: float
    additive: float


@pytest.fixture(scope="module")
def data() -> Data:
    law = CriteoLike(seed=0)
    train, _ = law.generate(STEPS * BATCH_SIZE, part=0)  # every row is seen once, so there is nothing to overfit
    test, truth = law.generate(TEST_ROWS, part=1)
    numbers = tuple(DenseField(name=name, encoding="log") for name in NUMBERS)
    categories = tuple(SparseField(name=name, min_count=5) for name in CATEGORIES)
    encoder = Encoder.fit(Schema(fields=(*numbers, *categories), labels=("label",)), train)
    label_N = test["label"].to_numpy()
    return Data(
        encoder.layout,
        [block.batch() for block in encoder.encode(train, block_rows=BATCH_SIZE)],
        encoder.transform(test, labels=True),
        bayes=log_loss(label_N, truth.probability),
        additive=log_loss(label_N, 1 / (1 + np.exp(-truth.additive_logit))),
    )


@pytest.fixture(autouse=True)
def _one_thread_in_double_precision() -> Iterator[None]:
    # In single precision, what another processor rounds differently grows to 1e-3 over these steps.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def run(config: ModelComponent.Config, data: Data, learning_rate: float) -> tuple[list[float], float]:
    """Training losses, and the loss on the test rows afterwards."""
    torch.manual_seed(0)
    model = build_model(config, data.layout)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    losses = []
    for batch in data.train:
        optimizer.zero_grad()
        loss = total_loss(model(batch), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, total_loss(model.eval()(data.test), data.test).item()


def test_deepfm_reproduces_its_losses_and_lies_between_lr_and_bayes(data: Data) -> None:
    small = {
        "embedding.dim": "8",
        "interaction.streams.1.hidden_units": "32,32",
        "interaction.streams.1.dropout": "0",
    }
    losses, final = run(override(preset("deepfm"), small, COMPONENTS), data, 0.01)
    _, first_order = run(preset("lr"), data, 0.05)
    # The planted interactions are invisible to a first-order model, which cannot do better than the additive truth.
    assert data.bayes < final < data.additive - 0.02
    assert final < first_order - 0.02
    assert first_order == pytest.approx(data.additive, abs=0.015)
    np.testing.assert_allclose(losses[19::20], GOLDEN, rtol=1e-4)
