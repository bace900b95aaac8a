from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.batch import embedding_parameters
from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.catgcn import CatInteraction
from ctrlib.interactions.fm import FM
from ctrlib.interactions.nfm import BiInteraction
from ctrlib.models.ctr import build_model
from ctrlib.models.presets import preset
from ctrlib.ragged import to_padded
from ctrlib.schema import BatchLayout, FieldLayout, SparseColumn
from tests.reference import catgcn as reference
from tests.reference.pairs import bi_interaction

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 3)

CONTRACT: dict[str, Interaction.Config] = {
    "catgcn": CatInteraction.Config(dropout=0.1),
    "catgcn_local": CatInteraction.Config(parts="local"),
    "catgcn_fused": CatInteraction.Config(
        output_dim=5, local_hidden_units=(8,), probe=3.0, probe_mode="per_feature", fusion_activation="relu"
    ),
}


def cat(dim: int = 3, **options: Any) -> CatInteraction:
    torch.manual_seed(1)
    block = CatInteraction(CatInteraction.Config(**options), FieldLayout(LAYOUT.names, dim)).double()
    if block.linear is not None and block.linear.bias is not None:
        nn.init.normal_(block.linear.bias)
    return block


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()


@pytest.mark.parametrize("probe", [0.0, 1.0, 39.0])
def test_equals_the_matrix_form(probe: float) -> None:
    block, x_BFD = cat(probe=probe), randn(5, 4, 3)
    assert block.out == FieldLayout(("local", "global"), 3)
    assert block.linear is not None
    for x, y in zip(array(x_BFD), array(block(x_BFD)), strict=True):
        weight, bias = array(block.linear.weight).T, array(block.linear.bias)
        np.testing.assert_allclose(y[0], bi_interaction(x), rtol=0, atol=1e-12)
        np.testing.assert_allclose(y[1], reference.global_interaction(x, weight, bias, probe), rtol=0, atol=1e-12)


def test_bags_equal_the_matrix_form_whatever_their_sizes() -> None:
    """Two bags for each row, of which one may be empty; a row without any feature has nothing."""
    block, sizes = cat(probe=2.0), [(3, 0), (1, 2), (0, 1), (4, 4), (0, 0)]
    bags = []
    for i in range(2):
        offsets = torch.tensor([0, *(size[i] for size in sizes)]).cumsum(0)
        bags.append((randn(int(offsets[-1]), 3) + i, offsets))
    y_B2D = block.pool(bags)
    assert block.linear is not None
    weight, bias = array(block.linear.weight).T, array(block.linear.bias)
    for row in range(4):
        e = np.concatenate([array(x[offsets[row] : offsets[row + 1]]) for x, offsets in bags])
        np.testing.assert_allclose(array(y_B2D[row, 0]), bi_interaction(e), rtol=0, atol=1e-12)
        expected = reference.global_interaction(e, weight, bias, 2.0)
        np.testing.assert_allclose(array(y_B2D[row, 1]), expected, rtol=0, atol=1e-12)
    assert not y_B2D[4].any()


@pytest.mark.parametrize("options", list(CONTRACT.values()), ids=list(CONTRACT))
def test_bags_of_one_size_equal_fields(options: Interaction.Config) -> None:
    torch.manual_seed(1)
    block = CatInteraction(options, LAYOUT).double().eval()  # type: ignore[arg-type]
    x_BFD = randn(6, 4, 3)
    bags = [(x_BFD.flatten(0, 1), torch.arange(7) * 4)]
    torch.testing.assert_close(block.pool(bags), block(x_BFD), rtol=0, atol=1e-12)


def test_hand_case() -> None:
    """Features 2 and 4, ρ = 2, W = 1, b = 0: smoothed 2.5 and 3.5."""
    block = CatInteraction(CatInteraction.Config(probe=2.0), FieldLayout(("a", "b"), 1))
    assert block.linear is not None
    nn.init.ones_(block.linear.weight)
    assert block(torch.tensor([[[2.0], [4.0]]])).tolist() == [[[8.0], [3.0]]]


def test_relations_to_other_blocks() -> None:
    """Local alone is NFM's pooling, and its coordinates add up to FM's pairs; a single feature has no pair."""
    block, x_BFD = cat(parts="local"), randn(5, 4, 3)
    torch.testing.assert_close(block(x_BFD), BiInteraction(BiInteraction.Config(), LAYOUT)(x_BFD), rtol=0, atol=1e-12)
    torch.testing.assert_close(block(x_BFD).sum(2, keepdim=True), FM(FM.Config(), LAYOUT)(x_BFD), rtol=0, atol=1e-12)
    assert cat(parts="local").pool([(randn(2, 3), torch.arange(3))]).abs().max() < 1e-15


def test_limits_of_the_probe() -> None:
    """ρ = 0 reads the mean of the features only; with a large one no feature knows of another."""
    x_BFD = randn(5, 4, 3)
    block = cat(probe=0.0, parts="global")
    assert block.linear is not None
    torch.testing.assert_close(block(x_BFD)[:, 0], block.linear(x_BFD.mean(1)).relu(), rtol=0, atol=1e-12)
    block = cat(probe=1e9, parts="global")
    assert block.linear is not None
    torch.testing.assert_close(block(x_BFD)[:, 0], block.linear(x_BFD).relu().mean(1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("form", ["fields", "bags"])
def test_order_of_features_means_nothing(form: str) -> None:
    block, x_BFD = cat(output_dim=2, global_hidden_units=(4,)), randn(5, 4, 3)

    def run(x_BFD: Tensor) -> Tensor:
        return block(x_BFD) if form == "fields" else block.pool([(x_BFD.flatten(0, 1), torch.arange(6) * 4)])

    torch.testing.assert_close(run(x_BFD), run(x_BFD[:, [2, 0, 3, 1]]), rtol=0, atol=1e-12)


def test_probe_per_feature_filters_bags_of_any_size_alike() -> None:
    """ρ/(S + ρ), the eigenvalue that is not 1, is the same for 4 and for 10 features; at 10 the modes agree."""
    fixed, scaled = (cat(probe=5.0, probe_mode=mode) for mode in ("fixed", "per_feature"))
    ten_BFD, four_BFD = randn(3, 10, 3), randn(3, 4, 3)
    torch.testing.assert_close(fixed(ten_BFD), scaled(ten_BFD), rtol=0, atol=1e-12)
    torch.testing.assert_close(scaled(four_BFD), cat(probe=2.0)(four_BFD), rtol=0, atol=1e-12)
    bags = [(four_BFD.flatten(0, 1), torch.arange(4) * 4)]
    torch.testing.assert_close(scaled.pool(bags), scaled(four_BFD), rtol=0, atol=1e-12)


def test_spectrum_of_the_complete_graph() -> None:
    values = np.sort(np.linalg.eigvalsh(reference.feature_matrix(7, 3.0)))
    np.testing.assert_allclose(values, [0.3] * 6 + [1.0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("steps", "published"), [(2, 17.28409), (3, 10.16955), (6, 3.40880)])
def test_several_steps_are_one_with_a_smaller_probe(steps: int, published: float) -> None:
    size, probe = 10, 39.0
    smaller = reference.probe_of_one_step(probe, steps, size)
    assert smaller == pytest.approx(published, abs=5e-6)
    assert smaller <= probe
    r = probe / (size + probe)
    assert smaller == pytest.approx(size * r**steps / (1 - r**steps), abs=1e-12)
    several = np.linalg.matrix_power(reference.feature_matrix(size, probe), steps)
    np.testing.assert_allclose(several, reference.feature_matrix(size, smaller), rtol=0, atol=1e-12)
    # and the block's own smoothing is that matrix
    block, x_BFD = cat(probe=smaller, parts="global", bias=False), randn(4, size, 3)
    assert block.linear is not None
    smooth_BFD = torch.from_numpy(several) @ x_BFD
    torch.testing.assert_close(block(x_BFD)[:, 0], block.linear(smooth_BFD).relu().mean(1), rtol=0, atol=1e-12)


def test_fusion_weighs_the_two_projections() -> None:
    plain, x_BFD = cat(), randn(5, 4, 3)
    h_B2D = plain(x_BFD)
    for activation in ("none", "relu"):
        fused = cat(balance=0.3, fusion_activation=activation, output_dim=2, local_hidden_units=(4,))
        assert fused.linear is not None
        assert plain.linear is not None
        fused.linear.load_state_dict(plain.linear.state_dict())
        parts = {name: fused.project[f"{name}_mlp"](h_B2D[:, i : i + 1]) for i, name in enumerate(("local", "global"))}
        parts = {name: y.relu() if activation == "relu" else y for name, y in parts.items()}
        expected = 0.3 * parts["global"] + 0.7 * parts["local"]
        torch.testing.assert_close(fused(x_BFD), expected, rtol=0, atol=1e-12)


def test_dropout_acts_after_the_activation_and_before_the_mean() -> None:
    """Each feature's term is kept or dropped by itself: a mean of S terms takes more than two values."""
    block = cat(dim=1, parts="global", dropout=0.5, probe=1e9, bias=False)
    assert block.linear is not None
    nn.init.ones_(block.linear.weight)
    torch.manual_seed(0)
    means = block.train()(torch.ones(400, 4, 1, dtype=torch.float64)).flatten()
    assert {round(value, 6) for value in means.tolist()} == {0.0, 0.5, 1.0, 1.5, 2.0}
    assert means.mean().item() == pytest.approx(1.0, abs=0.1)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("features", "classes", "local", "glob", "published"),
    [(309, 7, (), (), 24_846), (2_820, 3, (64,) * 4, (), 201_670), (2_820, 4, (), (64, 64), 193_480)],
    ids=["age", "purchase", "city"],
)
def test_published_sizes(features: int, classes: int, local: tuple[int, ...], glob: tuple[int, ...], published: int) -> None:
    """Tables included; ours have two rows more, for padding and for unseen values."""
    config = CatInteraction.Config(output_dim=classes, local_hidden_units=local, global_hidden_units=glob)
    assert features * 64 + count(CatInteraction(config, FieldLayout(("features",), 64))) == published


def test_global_layer_starts_as_released() -> None:
    """Xavier-uniform W, b = 0, in both of which torch's own start differs."""
    block = CatInteraction(CatInteraction.Config(), FieldLayout(("a",), 64))
    assert block.linear is not None
    bound = (6 / 128) ** 0.5
    assert 0.98 * bound < block.linear.weight.abs().max().item() <= bound
    assert not block.linear.bias.any()


def test_preset_returns_a_logit() -> None:
    layout = BatchLayout(sparse=tuple(SparseColumn(name, 9, name) for name in ("user", "item")))
    model = build_model(preset("catgcn_interaction"), layout)
    assert count(model) - count(nn.ParameterList(embedding_parameters(model))) == (64 * 64 + 64) + 2 * (64 * 64 + 64 + 65)


def test_config_errors() -> None:
    for options, message in (
        ({"probe": -1.0}, r"CatInteraction\.probe is -1\.0"),
        ({"balance": 1.5}, r"balance is 1\.5; expected a share"),
        ({"dropout": 1.0}, r"CatInteraction\.dropout is 1\.0"),
        ({"parts": "locl"}, "did you mean 'local'"),
    ):
        with pytest.raises(ConfigError, match=message):
            CatInteraction.Config(**options)
    with pytest.raises(ConfigError, match="hidden layers but no output_dim"):
        CatInteraction(CatInteraction.Config(local_hidden_units=(4,)), LAYOUT)


def test_padding_is_what_ragged_bags_do_without() -> None:
    """A reader of padded blocks gets the same by masking; here nothing is padded."""
    x_TD, offsets = randn(5, 3), torch.tensor([0, 2, 5])
    x_BLD, there_BL = to_padded(x_TD, offsets, torch.tensor([0, 0, 1, 1, 1]))
    assert there_BL.sum() == 5
    block = cat(parts="local")
    torch.testing.assert_close(block(x_BLD), block.pool([(x_TD, offsets)]), rtol=0, atol=1e-12)
