"""OptInter: the mixture against a plain formula, choices, sizes, and what it needs of the data."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.batch import Batch
from ctrlib.config import ConfigError, from_json, override, to_json
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.mlp import MLP
from ctrlib.metrics import auc
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.optinter import CHOICES, Choice, OptInter, field_pairs
from ctrlib.models.presets import COMPONENTS, optinter
from ctrlib.schema import BatchLayout, DataError, DenseColumn, SequenceColumn, SparseColumn
from tests.models.small import LAYOUT, awake, crossed, rows, with_crosses
from tests.reference.mlp import layer_norm, linear
from tests.reference.optinter import logit_gradient, mixture

TWO = BatchLayout((SparseColumn("a", 3, "a"), SparseColumn("b", 3, "b"), SparseColumn("a*b", 3, "a*b", ("a", "b"))))
CROSSED = with_crosses(LAYOUT)
PAIRS = ("user*item", "user*hour", "item*hour")


def model(layout: BatchLayout = CROSSED, *, dim: int = 3, **options: Any) -> OptInter:
    torch.manual_seed(1)
    embedding = FeatureEmbedding.Config(dim=dim, init_std=0.5)
    defaults: dict[str, Any] = {"embedding": embedding, "pair_dim": 2, "mlp": MLP.Config(hidden_units=(4,))}
    config = OptInter.Config(**(defaults | options))
    return cast(OptInter, build_model(config, layout)).eval()


def table(embedding: FeatureEmbedding | None) -> nn.Parameter:
    assert embedding is not None
    [weight] = [m.weight for m in embedding.modules() if isinstance(m, nn.Embedding)]
    return cast(nn.Parameter, weight)


def one(sparse: list[list[int]]) -> Batch:
    return Batch(sparse=torch.tensor(sparse, dtype=torch.int32), dense=torch.zeros(len(sparse), 0))


def golden() -> tuple[OptInter, Batch]:
    """a = (.2, .1, −.3), e^m = (1, 2), u_i = (.5, −1), u_j = (2, 3)."""
    m = model(TWO)
    with torch.no_grad():
        cast(Tensor, m.logits).copy_(torch.tensor([[0.2, 0.1, -0.3]]))
        table(m.crosses)[2] = torch.tensor([1.0, 2.0])
        table(m.factors)[2] = torch.tensor([0.5, -1.0])
        table(m.factors)[5] = torch.tensor([2.0, 3.0])
    return m, one([[2, 2, 2]])


@pytest.mark.parametrize(
    ("temperature", "shares", "vector"),
    [
        (1.0, (0.398189, 0.360297, 0.241514), (0.758486, -0.284511)),
        (0.5, (0.457329, 0.374429, 0.168242), (0.831758, -0.208630)),
        (0.1, (0.727475, 0.267623, 0.004902), (0.995098, 0.652081)),
        (0.01, (0.999955, 0.000045, 0.0), (1.000000, 1.999773)),
    ],
)
def test_golden_mixture(temperature: float, shares: tuple[float, ...], vector: tuple[float, ...]) -> None:
    m, batch = golden()
    m.temperature.fill_(temperature)
    torch.testing.assert_close(m.probabilities()[0], torch.tensor(shares), rtol=0, atol=1e-6)
    torch.testing.assert_close(cast(Tensor, m.pair_vectors(batch))[0, 0], torch.tensor(vector), rtol=0, atol=2e-6)


def by_hand(m: OptInter, batch: Batch) -> np.ndarray[Any, Any]:
    """Logits of the batch, in NumPy, from the weights."""
    weights = {name: value.detach().numpy() for name, value in m.state_dict().items()}
    e_BFD = m.embedding(batch).detach().numpy()
    crosses, factors = (
        None if part is None else (part.out.names, np.asarray(part(batch).detach().numpy())) for part in (m.crosses, m.factors)
    )
    logits = []
    for b in range(len(batch)):
        slots = []
        for slot in m.slots:
            [pair] = [p for p in m.pairs if p.name == slot]
            zeros = np.zeros(m.config.pair_dim)
            row = left = right = zeros
            if crosses is not None and pair.cross is not None and pair.cross in crosses[0]:
                row = crosses[1][b, crosses[0].index(pair.cross)]
            if factors is not None and {pair.left, pair.right} <= set(factors[0]):
                left, right = (factors[1][b, factors[0].index(name)] for name in (pair.left, pair.right))
            if m.logits is not None:
                a = dict(zip(m.operations, m.logits[m.pairs.index(pair)].tolist(), strict=True))
                a = {o: a.get(o, -1e9) for o in CHOICES} | ({"memorize": -1e9} if pair.cross is None else {})
                slots.append(mixture([a[o] for o in CHOICES], float(m.temperature), row, left, right))
            else:
                slots.append(row if m.best()[slot] == "memorize" else left * right)
        h = np.concatenate([e_BFD[b].ravel(), *slots])
        h = linear(h, weights["interaction.layers.0.weight"], weights["interaction.layers.0.bias"])
        h = layer_norm(h, weights["interaction.layers.1.weight"], weights["interaction.layers.1.bias"], 1e-5)
        logits.append(linear(np.maximum(h, 0), weights["head.linear.weight"], weights["head.linear.bias"])[0])
    return np.array(logits)


SOME = replace(CROSSED, sparse=CROSSED.sparse[:4])  # the cross of user and item only
MIXED: dict[str, Choice] = {"user*item": "factorize", "item*hour": "memorize"}


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (CROSSED, {}),
        (SOME, {}),
        (SOME, {"operations": ("memorize", "naive")}),
        (LAYOUT, {}),
        (CROSSED, {"operations": ("naive", "factorize")}),
        (CROSSED, {"choices": "memorize"}),
        (LAYOUT, {"choices": "factorize"}),
        (LAYOUT, {"choices": "naive"}),
        (CROSSED, {"choices": MIXED}),
    ],
)
def test_equals_the_formula(layout: BatchLayout, options: dict[str, Any]) -> None:
    m = awake(model(layout, mlp=MLP.Config(hidden_units=(4,), norm="layer"), **options)).double()
    assert isinstance(m, OptInter)
    batch = rows(6)
    batch = crossed(batch, LAYOUT) if len(layout.sparse) > 3 else batch
    batch = replace(batch, sparse=batch.sparse[:, : len(layout.sparse)], dense=batch.dense.double())
    if m.logits is not None:
        m.temperature.fill_(0.3)
    np.testing.assert_allclose(m(batch).logits.detach().numpy(), by_hand(m, batch), rtol=1e-9)


def test_gradient_of_the_logits() -> None:
    m, batch = golden()
    m.temperature.fill_(0.7)
    above = torch.tensor([0.3, -1.7])
    (cast(Tensor, m.pair_vectors(batch))[0, 0] @ above).backward()  # type: ignore[no-untyped-call]
    expected = logit_gradient([0.2, 0.1, -0.3], 0.7, above.double().numpy(), np.array([1.0, 2.0]), np.array([1.0, -3.0]))
    torch.testing.assert_close(cast(Tensor, cast(Tensor, m.logits).grad)[0], torch.tensor(expected, dtype=torch.float32))


def test_a_pair_without_effect_has_no_gradient() -> None:
    m, batch = golden()
    (cast(Tensor, m.pair_vectors(batch))[0, 0] @ torch.zeros(2)).backward()  # type: ignore[no-untyped-call]
    assert not cast(Tensor, cast(Tensor, m.logits).grad).any()


def test_a_cross_is_found_by_its_parts() -> None:
    """The released code looks pairs up in the dictionary of another; here neither order nor name of columns matters."""
    m, batch = model(), crossed(rows(6), LAYOUT)
    awake(m)
    order = [0, 1, 2, 5, 3, 4]
    turned = replace(CROSSED.sparse[3], name="visits", parts=("item", "user"))
    columns = (*CROSSED.sparse[:3], turned, *CROSSED.sparse[4:])
    other = model(replace(CROSSED, sparse=tuple(columns[i] for i in order)))
    assert [p.cross for p in other.pairs] == ["visits", "user*hour", "item*hour"]
    assert [p.name for p in other.pairs] == list(PAIRS)
    state = m.state_dict()
    sizes = [CROSSED.sparse[i].vocab_size for i in (3, 4, 5)]
    by_cross = torch.split(table(m.crosses).detach(), sizes)
    state["crosses.tables.0.rows.weight"] = torch.cat([by_cross[i] for i in (2, 0, 1)])
    other.load_state_dict(state)
    shuffled = replace(batch, sparse=batch.sparse[:, order])
    torch.testing.assert_close(other(shuffled).logits, m(batch).logits)


def test_pairs_are_of_categorical_fields_only() -> None:
    """The released code crosses 13 numbers and 13 categories on Criteo; here numbers, sequences and crosses form no pairs."""
    assert [p.name for p in field_pairs(CROSSED)] == list(PAIRS)
    assert [p.name for p in field_pairs(CROSSED, ("price", "hour", "user", "history"))] == ["user*hour"]
    assert field_pairs(CROSSED, ("hour", "user"))[0].cross is None
    assert field_pairs(BatchLayout(dense=(DenseColumn("x"),), sequences=(SequenceColumn("s", 5, "s"),))) == ()


def test_only_needed_parts_exist() -> None:
    mixture_ = model()
    assert mixture_.slots == PAIRS
    assert table(mixture_.crosses).shape == (9 * 12 + 9 * 5 + 12 * 5, 2)
    assert table(mixture_.factors).shape == (9 + 12 + 5, 2)
    assert model(operations=("factorize", "naive")).crosses is None
    assert model(operations=("memorize", "naive")).factors is None
    naive = model(choices="naive")
    assert (naive.crosses, naive.factors, naive.slots, naive.logits) == (None, None, (), None)
    some = model(choices={"hour*item": "memorize", "user*item": "factorize"})  # a pair in the other order, too
    assert some.best() == {"user*item": "factorize", "user*hour": "naive", "item*hour": "memorize"}
    assert some.slots == ("item*hour", "user*item")
    assert table(some.crosses).shape == (12 * 5, 2)
    assert table(some.factors).shape == (9 + 12, 2)
    assert some.interaction.layers[0].in_features == 7 * 3 + 2 * 2  # the crosses are no fields of the first table
    assert some.embedding.out.names == LAYOUT.names


def test_products_start_as_large_as_rows_of_crosses() -> None:
    layout = BatchLayout((SparseColumn("a", 5000, "a"), SparseColumn("b", 5000, "b"), SparseColumn("x", 5000, "x", ("a", "b"))))
    m = model(layout, embedding=FeatureEmbedding.Config(dim=2, init_std=0.04))
    batch = one([[i, i, i] for i in range(1, 5000)])
    products = model(layout, embedding=m.config.embedding, choices="factorize").pair_vectors(batch)
    assert float(cast(Tensor, products).detach().std()) == pytest.approx(0.04, rel=0.1)
    assert float(table(m.crosses).detach().std()) == pytest.approx(0.04, rel=0.1)


def test_data_without_crosses() -> None:
    assert model(LAYOUT).operations == ("factorize", "naive")
    with pytest.raises(ConfigError, match=r"'user\*item' is to be memorised, but the data has no cross.*CrossField.*prepare"):
        model(LAYOUT, choices="memorize")
    with pytest.raises(ConfigError, match=r"operations is memorize, naive, but the data has no cross.*CrossField"):
        model(LAYOUT, operations=("memorize", "naive"))
    with pytest.raises(ConfigError, match=r"'user\*hour' is to be memorised"):
        model(SOME, choices="memorize")
    assert not model(SOME).probabilities()[1:, 0].any()


def test_pairs_of_one_name_are_refused() -> None:
    layout = BatchLayout(tuple(SparseColumn(name, 5, name) for name in ("a", "b*c", "a*b", "c")))
    with pytest.raises(DataError, match=r"two pairs of fields would both be called 'a\*b\*c'; rename"):
        field_pairs(layout)
    assert field_pairs(layout, ("a", "b*c", "c"))[0].name == "a*b*c"


def test_no_pairs_is_a_plain_network() -> None:
    layout = BatchLayout(sparse=LAYOUT.sparse[:1], dense=LAYOUT.dense)
    for choices in (None, "memorize", "factorize"):
        m = model(layout, choices=choices)
        assert (m.logits, m.crosses, m.factors, m.slots, m.axes, m.best()) == (None, None, None, (), {}, {})


def test_forward_moves_no_clock() -> None:
    """The released code counts evaluations as training steps of its temperature."""
    m, batch = model(), crossed(rows(6), LAYOUT)
    m.temperature.fill_(0.5)
    for mode in (True, False):
        m.train(mode)(batch)
    assert float(m.temperature) == 0.5
    assert {"logits", "temperature", "closed"} <= set(m.state_dict())  # in the released code the logits are lost on saving


@pytest.mark.parametrize("relaxation", ["gumbel", "straight_through"])
def test_noise_is_for_training(relaxation: str) -> None:
    m = model(relaxation=relaxation)
    with torch.no_grad():
        cast(Tensor, m.logits).zero_()
    assert torch.equal(m.probabilities(), m.probabilities())
    m.train()
    torch.manual_seed(3)
    drawn_NPO = torch.stack([m.probabilities() for _ in range(2000)]).detach()
    assert (drawn_NPO[0] != drawn_NPO[1]).any()
    # Gumbel-max: the largest of equal logits with noise is each operation equally often.
    often_PO = nn.functional.one_hot(drawn_NPO.argmax(2), 3).float().mean(0)
    torch.testing.assert_close(often_PO, torch.full((3, 3), 1 / 3), rtol=0, atol=0.04)
    hard = ((drawn_NPO < 1e-6) | (drawn_NPO > 1 - 1e-6)).all()
    assert bool(hard) == (relaxation == "straight_through")
    m.probabilities()[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    assert cast(Tensor, cast(Tensor, m.logits).grad).any()


def test_softmax_has_no_noise() -> None:
    m = model().train()
    assert torch.equal(m.probabilities(), m.probabilities())


def test_logits_start_as_xavier_normal() -> None:
    layout = with_crosses(BatchLayout(tuple(SparseColumn(f"f{i}", 3, f"f{i}") for i in range(26))))
    assert float(cast(Tensor, model(layout).logits).detach().std()) == pytest.approx((2 / 328) ** 0.5, rel=0.1)
    assert not cast(Tensor, model(layout, arch_gain=0.0).logits).any()


def test_fixed_mixture() -> None:
    m, batch = awake(model()), crossed(rows(6), LAYOUT)
    assert isinstance(m, OptInter)
    m.temperature.fill_(0.3)
    m.fix({"user*hour": "memorize", "item*hour": "factorize"})
    assert torch.equal(m.probabilities(), torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]))
    assert m.best() == {"user*item": "naive", "user*hour": "memorize", "item*hour": "factorize"}
    assert not cast(Tensor, m.logits).requires_grad
    again = model()
    again.load_state_dict(m.state_dict())
    assert torch.equal(again(batch).logits, m(batch).logits)
    with pytest.raises(ConfigError, match="the mixture offers factorize, naive"):
        model(operations=("factorize", "naive")).fix("memorize")
    with pytest.raises(ConfigError, match="only a mixture"):
        model(choices="naive").fix("naive")


def test_explain_shows_the_shares() -> None:
    m, batch = model(), crossed(rows(5), LAYOUT)
    assert m.axes == {"choice": (PAIRS, CHOICES)}
    assert torch.equal(m.explain(batch)["choice"][3], m.probabilities())
    shown = model(choices=MIXED).explain(batch)["choice"]
    assert torch.equal(shown[4], torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]))


def test_choices_survive_json_and_can_be_set_by_path() -> None:
    config = replace(optinter(), choices=MIXED)
    again = from_json(json.loads(json.dumps(to_json(config))), ModelComponent.Config, COMPONENTS)
    assert again == config
    every = override(optinter(), {"choices": "factorize", "operations": "factorize,naive"}, COMPONENTS)
    assert (every.choices, every.operations) == ("factorize", ("factorize", "naive"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pair_dim": 0}, "pair_dim is 0"),
        ({"arch_gain": -1.0}, "arch_gain is -1.0"),
        ({"relaxation": "gumbell"}, "relaxation is 'gumbell'.*did you mean 'gumbel'"),
        ({"operations": ("memorise", "naive")}, "operations is 'memorise'.*did you mean 'memorize'"),
        ({"operations": ("naive",)}, "expected two or three different ones.*set choices"),
        ({"operations": ("naive", "naive")}, "expected two or three different ones"),
        ({"choices": "factorise"}, "choices is 'factorise'.*did you mean 'factorize'"),
        ({"choices": {"a*b": "memory"}}, r"choices\['a\*b'\] is 'memory'"),
        ({"mlp": MLP.Config(output_dim=1)}, "output_dim is 1; expected None"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptInter.Config(**options)


def test_choices_name_pairs_of_the_data() -> None:
    with pytest.raises(ConfigError, match=r"names 'user\*itm', which is no pair.*did you mean 'user\*item'"):
        model(choices={"user*itm": "factorize"})
    with pytest.raises(ConfigError, match=r"names 'user\*price'"):
        model(choices={"user*price": "factorize"})


# Fields: numbers, categories; values of categories, values of crosses (OOV not counted); s1, s2, MLP: the paper's section IV.
CRITEO = (13, 26, 514_758, 21_037_178, 20, 10, (700,) * 5)
AVAZU = (0, 24, 1_228_770, 240_329_204, 40, 4, (500,) * 5)


def counts(data: tuple[Any, ...], choices: Choice | None) -> tuple[int, int]:
    """Parameters as published, and logits.

    The released code has one padding row a table where every vocabulary has one here, none of them trained, and in its second
    table also rows for numbers, which form no pairs.
    """
    numbers, categories, values, crosses, s1, s2, hidden = data
    fields = [SparseColumn(f"C{i}", 2 + (values if i == 0 else 0), f"C{i}") for i in range(categories)]
    layout = with_crosses(BatchLayout(tuple(fields)))
    pairs = len(layout.sparse) - categories
    columns = [replace(c, vocab_size=2 + (crosses if i == 0 else 0)) for i, c in enumerate(layout.sparse[categories:])]
    layout = BatchLayout((*fields, *columns), tuple(DenseColumn(f"I{i}") for i in range(numbers)))
    config = replace(optinter(), embedding=FeatureEmbedding.Config(dim=s1), pair_dim=s2, choices=choices)
    with torch.device("meta"):
        m = cast(OptInter, build_model(replace(config, mlp=MLP.Config(hidden_units=hidden, norm="layer")), layout))
    total = sum(p.numel() for p in m.parameters()) - (categories - 1) * s1
    total -= 0 if m.crosses is None else (pairs - 1) * s2
    total += 0 if m.factors is None else (numbers - (categories - 1)) * s2
    logits = 0 if m.logits is None else m.logits.numel()
    return total - logits, logits


def test_parameters_of_the_paper() -> None:
    assert counts(CRITEO, "memorize") == (225_463_201, 0)
    assert counts(CRITEO, "factorize") == (20_236_141, 0)
    assert counts(CRITEO, None) == (230_611_181, 975)
    assert counts(AVAZU, "memorize") == (1_012_509_725, 0)
    assert counts(AVAZU, "factorize") == (56_106_981, 0)
    assert counts(AVAZU, None) == (1_017_424_905, 828)


def separates(choice: Choice, seed: int) -> float:
    """AUC on all pairs of 100 × 100 values with random labels after 1000 full steps of a network too small to learn them."""
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, 10_000).astype(np.float32))
    batch = torch.cartesian_prod(torch.arange(2, 102), torch.arange(2, 102))
    layout = BatchLayout((SparseColumn("a", 102, "a"), SparseColumn("b", 102, "b")))
    crossed_ = crossed(Batch(sparse=batch.to(torch.int32), dense=torch.zeros(10_000, 0)), layout)
    torch.manual_seed(seed)
    config = OptInter.Config(
        embedding=FeatureEmbedding.Config(dim=2, init_std=0.1), pair_dim=2, choices=choice, mlp=MLP.Config(hidden_units=(4,))
    )
    m = build_model(config, with_crosses(layout)).train()
    optimizer = torch.optim.Adam(m.parameters(), lr=0.01)
    for _ in range(1000):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(m(crossed_).logits, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return auc(labels.numpy(), m(crossed_).logits.detach().numpy())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_what_has_full_rank_must_be_memorised(seed: int) -> None:
    assert separates("memorize", seed) > 0.99
    assert separates("factorize", seed) < 0.80
    assert separates("naive", seed) < 0.75
