"""Labels of classes: the loss, the metrics, and the schema that names them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, log_loss, roc_auc_score

from ctrlib.batch import Batch, Edges, Output
from ctrlib.config import ConfigError
from ctrlib.losses import class_loss, total_loss
from ctrlib.metrics import summarize_classes
from ctrlib.schema import DataError, Schema, SequenceField


def test_loss_by_hand() -> None:
    """−ln ¼ and −ln ¾ with weights 1 and 3; the third row weighs nothing."""
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)], [9.0, 0.0]])
    labels, weight = torch.tensor([0, 1, 1]), torch.tensor([1.0, 3.0, 0.0])
    expected = (math.log(4) + 3 * math.log(4 / 3)) / 4
    assert class_loss(logits, labels, weight).item() == pytest.approx(expected)
    assert class_loss(logits[:2], labels[:2]).item() == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)
    assert class_loss(logits, labels, torch.zeros(3)).item() == 0
    batch = Batch(sparse=torch.zeros(3, 0), dense=torch.zeros(3, 0), labels=labels, weight=weight)
    assert total_loss(Output(logits, {"more": torch.tensor(2.0)}, classes=True), batch).item() == pytest.approx(expected + 2)


def test_loss_refuses_labels_of_zero_and_one() -> None:
    with pytest.raises(ConfigError, match="expected the number of one class for every row"):
        class_loss(torch.zeros(3, 2), torch.zeros(3, 1))


@pytest.mark.parametrize("count", [2, 4])
def test_metrics_equal_those_of_scikit_learn(count: int) -> None:
    rng = np.random.default_rng(count)
    p = rng.dirichlet(np.ones(count), 300)
    y, weight = rng.integers(0, count, 300), rng.choice([0.0, 0.5, 2.0], 300)
    found = summarize_classes(y, p, weight=weight)
    kept = weight > 0
    y, p, said = y[kept], p[kept], p[kept].argmax(1)
    assert found["rows"] == kept.sum()
    assert found["accuracy"] == pytest.approx((said == y).mean())
    assert found["macro_f1"] == pytest.approx(f1_score(y, said, average="macro"))
    assert found["log_loss"] == pytest.approx(log_loss(y, p, sample_weight=weight[kept]))
    auc = roc_auc_score(y, p[:, 1]) if count == 2 else roc_auc_score(y, p, multi_class="ovr", average="macro")
    assert found["auc"] == pytest.approx(auc)


def test_a_class_that_is_neither_there_nor_said_is_no_zero_in_the_mean() -> None:
    found = summarize_classes([0, 1], [[0.9, 0.1, 0], [0.2, 0.8, 0]])
    assert found["macro_f1"] == 1
    assert found["auc"] == 1  # of the two classes that are there


def test_auc_is_the_mean_over_the_classes_that_are_there() -> None:
    """Of three classes, none of the last: the mean of the first two against the rest. Of a single class there is none."""
    p = np.array([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.4, 0.5, 0.1], [0.5, 0.3, 0.2]])
    found = summarize_classes([0, 0, 1, 1], p)
    assert found["auc"] == pytest.approx((2 / 4 + 3 / 4) / 2)  # by counting pairs
    assert math.isnan(summarize_classes([1, 1, 1, 1], p)["auc"])


def test_metrics_refuse_what_cannot_be() -> None:
    for labels, p, weight, message in (
        ([0, 2], [[0.5, 0.5]] * 2, None, "labels are no class; expected 0 to 1"),
        ([0, 1], [[0.5, 1.5]] * 2, None, "probabilities outside"),
        ([0, 1], [0.5, 0.5], None, r"expected \[rows\], \[rows, classes\]"),
        ([0, 1], [[0.5, 0.5]] * 2, [1.0, -1.0], "weights are negative"),
        ([0, 1], [[0.5, 0.5]] * 2, [1.0], "one per row"),
    ):
        with pytest.raises(DataError, match=message):
            summarize_classes(labels, p, weight=weight)


def test_schema_names_the_classes(tmp_path: Path) -> None:
    schema = Schema(fields=(SequenceField(name="features"),), labels=("team",), classes=("a", "b"))
    schema.save(tmp_path / "schema.json")
    assert Schema.load(tmp_path / "schema.json") == schema
    with pytest.raises(DataError, match="expected one label, and two or more classes"):
        replace(schema, classes=("a", "a"))
    with pytest.raises(DataError, match="expected one label"):
        replace(schema, labels=("team", "other"))
    with pytest.raises(DataError, match="classes is 3; expected a list"):
        Schema.from_json({**schema.to_json(), "classes": 3})


def test_edges_travel_with_the_batch() -> None:
    edges = Edges(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([0.5]), symmetric=False)
    batch = Batch(sparse=torch.zeros(1, 0), dense=torch.zeros(1, 0), edges=edges)
    moved = batch.to("meta").edges
    assert moved is not None
    assert (moved.offsets.device.type, moved.sources.device.type, moved.weight.device.type) == ("meta",) * 3
    assert moved.symmetric is False
