"""The synthetic law against its own tables, by loops and exact sums, and samples against the law."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from ctrlib.data import synthetic
from ctrlib.data.synthetic import PLANTED_PAIRS, CriteoLike, Truth, write_splits
from ctrlib.schema import DataError

ROWS = 100_000
NUMERIC = [f"I{i}" for i in range(1, 14)]
CATEGORICAL = [f"C{i}" for i in range(1, 27)]


@pytest.fixture(scope="module")
def law() -> CriteoLike:
    return CriteoLike(seed=0)


@pytest.fixture(scope="module")
def sample(law: CriteoLike) -> tuple[pa.Table, Truth]:
    return law.generate(ROWS)


def test_columns_are_shaped_like_criteo(sample: tuple[pa.Table, Truth]) -> None:
    table, truth = sample
    assert table.column_names == ["label", *NUMERIC, *CATEGORICAL]
    assert table.num_rows == ROWS
    assert table.schema.field("label").type == pa.int8()
    assert all(table.schema.field(name).type == pa.int32() for name in NUMERIC)
    assert all(table.schema.field(name).type == pa.string() for name in CATEGORICAL)
    assert truth.probability.shape == truth.additive_logit.shape == (ROWS,)
    assert truth.probability.dtype == truth.additive_logit.dtype == np.float64
    assert set(np.unique(table["label"].to_numpy())) == {0, 1}
    for name in CATEGORICAL:
        values = table[name].drop_null().unique().to_pylist()
        assert all(len(value) == 8 and set(value) <= set("0123456789abcdef") for value in values)
    for name in NUMERIC:
        assert min(table[name].drop_null().unique().to_pylist()) >= 0


def test_the_law_is_a_set_of_distributions_over_distinct_values(law: CriteoLike) -> None:
    assert [f.name for f in law.fields] == NUMERIC + CATEGORICAL
    sizes = {f.name: len(f.values) - 1 for f in law.fields if f.name in CATEGORICAL}
    assert min(sizes.values()) == 3
    assert max(sizes.values()) == 100_000
    for field in law.fields:
        assert field.probability.shape == field.effect.shape == (len(field.values),)
        assert field.probability.sum() == pytest.approx(1.0, abs=1e-12)
        assert field.probability.min() >= 0
        assert field.values[0].as_py() is None
        assert field.values.null_count == 1
        assert len(field.values.unique()) == len(field.values)
    zipf = next(f for f in law.fields if f.name == "C14").probability
    assert zipf[1] / zipf[8] == pytest.approx(8**1.05)


def test_samples_follow_the_law(law: CriteoLike, sample: tuple[pa.Table, Truth]) -> None:
    table, _ = sample
    criteo = {"I1": 0.45, "I2": 0.0, "I12": 0.77, "C1": 0.0, "C6": 0.12, "C20": 0.44, "C22": 0.77}
    for field in law.fields:
        rate = table[field.name].null_count / ROWS
        expected = criteo.get(field.name, float(field.probability[0]))
        assert abs(rate - expected) <= 5 * math.sqrt(expected * (1 - expected) / ROWS), field.name
        most = int(field.probability.argmax())
        column = table[field.name]
        count = column.null_count if most == 0 else pc.sum(pc.equal(column, field.values[most])).as_py()
        share = count / ROWS
        assert abs(share - field.probability[most]) <= 5 * math.sqrt(0.25 / ROWS), field.name


def test_truth_is_the_sum_of_the_tables(law: CriteoLike, sample: tuple[pa.Table, Truth]) -> None:
    table, truth = sample
    position = {f.name: {v: i for i, v in enumerate(f.values.to_pylist())} for f in law.fields}
    for row in range(0, ROWS, ROWS // 50):
        record = {name: position[name][table[name][row].as_py()] for name in position}
        logit = law.bias
        for field in law.fields:
            logit += field.effect[record[field.name]]
        assert truth.additive_logit[row] == pytest.approx(logit, abs=1e-12)
        for interaction in law.interactions:
            a, b = (record[name] for name in interaction.pair)
            logit += sum(x * y for x, y in zip(interaction.left[a], interaction.right[b], strict=True))
        assert truth.probability[row] == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_interactions_are_centred_given_either_field(seed: int) -> None:
    law = CriteoLike(seed)
    assert tuple(i.pair for i in law.interactions) == PLANTED_PAIRS
    assert any(a in NUMERIC and b in CATEGORICAL for a, b in PLANTED_PAIRS)
    fields = {f.name: f for f in law.fields}
    for field in law.fields:
        assert abs(field.probability @ field.effect) < 1e-12
    for interaction in law.interactions:
        a, b = (fields[name] for name in interaction.pair)
        table = interaction.left @ interaction.right.T  # every pair of values, no sampling
        assert np.abs(table @ b.probability).max() < 1e-12
        assert np.abs(a.probability @ table).max() < 1e-12
        assert math.sqrt(a.probability @ table**2 @ b.probability) > 0.25  # logits: not because there is nothing


def test_high_cardinality_fields_are_noise(law: CriteoLike) -> None:
    large = {f.name for f in law.fields if f.name in CATEGORICAL and len(f.values) > 5000}
    assert len(large) >= 4
    assert not any(f.effect.any() for f in law.fields if f.name in large)
    assert not large.intersection(name for pair in PLANTED_PAIRS for name in pair)


def test_generation_is_deterministic_and_parts_differ(law: CriteoLike) -> None:
    table, truth = law.generate(1000, part=3)
    again, truth_again = CriteoLike(seed=0).generate(1000, part=3)
    assert table.equals(again)
    assert np.array_equal(truth.probability, truth_again.probability)
    other, other_truth = law.generate(1000, part=4)
    assert abs(np.corrcoef(truth.probability, other_truth.probability)[0, 1]) < 0.15
    assert not table.equals(other)
    assert not table.equals(CriteoLike(seed=1).generate(1000, part=3)[0])
    assert law.generate(0)[0].schema == table.schema
    with pytest.raises(DataError, match="part -1"):
        law.generate(10, part=-1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bayes_numbers_and_the_planted_margin(seed: int) -> None:
    table, truth = CriteoLike(seed).generate(ROWS)
    label, p = table["label"].to_numpy(), truth.probability
    # The expected log loss of the true probabilities is their mean entropy; its variance follows from the same p.
    entropy = float(np.mean(-p * np.log(p) - (1 - p) * np.log(1 - p)))
    standard_error = math.sqrt(float(np.mean(p * (1 - p) * np.log(p / (1 - p)) ** 2)) / ROWS)
    assert abs(sklearn_log_loss(label, p) - entropy) < 3 * standard_error
    assert label.mean() == pytest.approx(0.25, abs=0.01)
    bayes, additive = roc_auc_score(label, p), roc_auc_score(label, truth.additive_logit)
    assert 0.80 < bayes < 0.85
    assert bayes - 0.09 < additive < bayes - 0.04


def test_write_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "CHUNK_ROWS", 7_000)
    summary = write_splits(tmp_path / "new", 20_005, seed=5)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["test.parquet", "train.parquet", "valid.parquet"]
    assert {split: s["rows"] for split, s in summary.items()} == {"train": 16_005, "valid": 2_000, "test": 2_000}
    law = CriteoLike(5)
    expected = [law.generate(size, part) for part, size in enumerate([7_000, 7_000, 2_005, 2_000, 2_000])]
    file = pq.ParquetFile(tmp_path / "new" / "train.parquet")
    assert file.metadata.num_row_groups == 3
    assert file.metadata.row_group(0).column(5).compression == "ZSTD"
    assert file.read().equals(pa.concat_tables([table for table, _ in expected[:3]]))
    for split, (table, truth) in zip(("valid", "test"), expected[3:], strict=True):
        assert pq.read_table(tmp_path / "new" / f"{split}.parquet").equals(table)
        label = table["label"].to_numpy()
        assert summary[split] == pytest.approx(
            {
                "rows": 2_000,
                "label_rate": label.mean(),
                "bayes_auc": roc_auc_score(label, truth.probability),
                "bayes_log_loss": sklearn_log_loss(label, truth.probability),
                "additive_auc": roc_auc_score(label, truth.additive_logit),
            },
            rel=1e-9,
        )
    with pytest.raises(DataError, match="at least 10"):
        write_splits(tmp_path, 9)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.parquet").write_text("old")
    monkeypatch.setattr(CriteoLike, "generate", lambda law, rows, part=0: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_splits(tmp_path, 100)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("train.parquet", "old")]
