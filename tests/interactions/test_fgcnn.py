from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction, build
from ctrlib.interactions.compose import Stack
from ctrlib.interactions.fgcnn import FGCNN
from ctrlib.interactions.fm import FM
from ctrlib.interactions.inner_product import InnerProduct
from ctrlib.interactions.linear import FirstOrder
from ctrlib.interactions.mlp import MLP
from ctrlib.schema import FieldLayout
from tests.interactions.contract import Need, even_width
from tests.reference import fgcnn as reference

LAYOUT = FieldLayout(("user", "item", "hour", "city", "week"), 3)
SMALL: dict[str, Any] = {"kernel_heights": (3, 2), "channels": (2, 3), "pool_sizes": (2, 2), "new_maps": (2, 1)}
NO_NORM: dict[str, Any] = {"conv_norm": "none", "recombine_norm": "none"}
# The paper's settings: fields, k, h, m_c, m_r, MLP; then its heights, N_i, T and the width that the MLP reads.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "criteo": (39, 20, 9, (38, 40, 42, 44), 3, (4096, 2048), [20, 10, 5, 3], [60, 30, 15, 9], 153, 14_688),
    "avazu": (24, 40, 7, (14, 16, 18, 20), 3, (4096, 2048, 1024, 512), [12, 6, 3, 2], [36, 18, 9, 6], 93, 7_998),
    "huawei": (29, 40, 13, (6, 8, 10, 12), 2, (2048, 1024, 512, 256, 128), [15, 8, 4, 2], [30, 16, 8, 4], 87, 7_221),
}
# Weights of the convolutions, of the recombinations with biases, and of the MLP with output 1.
PARAMETERS = {
    "criteo": (45_774, 24_775_200 + 2_280, 68_558_849),
    "avazu": (6_202, 13_603_200 + 2_760, 43_778_049),
    "huawei": (3_302, 6_624_000 + 2_320, 17_577_985),
}

FGCNN_SIZES: dict[str, Any] = {"kernel_heights": (3, 2), "channels": (2, 3), "pool_sizes": (2, 2), "new_maps": (2, 1)}
CONTRACT: dict[str, Interaction.Config] = {
    "fgcnn": FGCNN.Config(**FGCNN_SIZES),
    "fgcnn_two_vectors": FGCNN.Config(**FGCNN_SIZES, share_embedding=False, conv_norm="none", conv_bias=True, pool_pad="start"),
    "fgcnn_mlp": FGCNN.Config(**FGCNN_SIZES, generator="mlp", use_raw=False, field_order=("city", "user", "hour", "item")),
    "fgcnn_maps": FGCNN.Config(kernel_heights=(4,), channels=(2,), pool_sizes=(3,), new_maps=(2,), recombine=False),
}
# field_order names all fields.
NEEDS: dict[str, Need] = {
    "fgcnn_two_vectors": even_width,
    "fgcnn_mlp": lambda layout: set(layout.names) == {"city", "user", "hour", "item"},
}


def fgcnn(layout: FieldLayout = LAYOUT, **options: Any) -> FGCNN:
    torch.manual_seed(1)
    return FGCNN(FGCNN.Config(**(SMALL | options)), layout).double().eval()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def size(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


def fields(count: int, dim: int) -> FieldLayout:
    return FieldLayout(tuple(f"f{i}" for i in range(count)), dim)


def published(name: str, **options: Any) -> tuple[FGCNN, Interaction]:
    """The generator, and the classifier IPNN behind it; without memory for the weights."""
    num_fields, dim, height, channels, maps, hidden, *_ = PUBLISHED[name]
    count = len(channels)
    config = FGCNN.Config(
        kernel_heights=(height,) * count, channels=channels, pool_sizes=(2,) * count, new_maps=(maps,) * count, **options
    )
    with torch.device("meta"):
        block = FGCNN(config, fields(num_fields, dim))
        classifier = Stack.Config(blocks=(InnerProduct.Config(), MLP.Config(hidden_units=hidden, output_dim=1)))
        return block, build(classifier, block.out)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name: str) -> None:
    *_, heights, counts, total, width = PUBLISHED[name]
    block, classifier = published(name)
    maps = PUBLISHED[name][4]
    generated = [sum(n.startswith(f"fgcnn_{i}_") for n in block.out.names) for i in range(4)]
    assert generated == counts
    assert [n // maps for n in generated] == heights
    assert block.num_generated == sum(counts)
    assert block.out.num_fields == total
    assert next(m for m in classifier.modules() if isinstance(m, nn.Linear)).in_features == width


def test_figure_2_has_69_new_fields_and_floor_would_make_66() -> None:
    assert published("avazu")[0].num_generated == 69
    assert published("avazu", pooling="floor")[0].num_generated == 66
    assert published("criteo", pooling="floor")[0].num_generated == 102
    assert published("huawei", pooling="floor")[0].num_generated == 50


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    block, classifier = published(name)
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert size(nn.ModuleList(norms)) == 2 * sum(m.num_features for m in norms)
    convolutions = sum(size(m) for m in block.modules() if isinstance(m, nn.Conv2d))
    recombinations = sum(size(m) for m in block.modules() if isinstance(m, nn.Linear))
    assert (convolutions, recombinations, size(classifier)) == PARAMETERS[name]
    assert size(block) == convolutions + recombinations + size(nn.ModuleList(norms))


def test_biases_of_the_convolutions() -> None:
    def convs(**options: Any) -> list[nn.Conv2d]:
        return [m for m in fgcnn(**options).modules() if isinstance(m, nn.Conv2d)]

    assert all(m.bias is None for m in convs())
    assert all(m.bias is not None and not m.bias.any() for m in convs(**NO_NORM))
    assert all(m.bias is not None for m in convs(conv_bias=True))
    assert all(m.bias is None for m in convs(conv_bias=False, **NO_NORM))


def golden() -> FGCNN:
    """One map, h = 3, w = (.5, −1, .25), pooling by 2, W = I/2 and b = (0, .1, 0, −.1)."""
    config = FGCNN.Config(kernel_heights=(3,), channels=(1,), pool_sizes=(2,), new_maps=(1,), conv_bias=False, **NO_NORM)
    block = FGCNN(config, fields(4, 2)).double()
    block.load_state_dict(
        {
            "convolutions.0.0.weight": torch.tensor([0.5, -1.0, 0.25]).view(1, 1, 3, 1),
            "recombinations.0.0.weight": 0.5 * torch.eye(4),
            "recombinations.0.0.bias": torch.tensor([0.0, 0.1, 0.0, -0.1]),
        }
    )
    return block


X_BFD = torch.tensor([[[0.1, 0.2], [0.3, -0.1], [-0.2, 0.4], [0.5, 0.0]]], dtype=torch.float64)


def test_golden_case() -> None:
    block = golden()
    convolution = cast(nn.Sequential, block.convolutions[0])
    before_pooling = convolution[:-1](X_BFD.unsqueeze(1))[0, 0].detach().numpy()
    expected = [[-0.024995, -0.221278], [-0.291313, 0.291313], [0.442230, -0.421899], [-0.537050, 0.197375]]
    np.testing.assert_allclose(before_pooling, expected, rtol=0, atol=1e-6)
    pooled = convolution(X_BFD.unsqueeze(1))[0, 0].detach().numpy()
    np.testing.assert_allclose(pooled, [[-0.024995, 0.291313], [0.442230, 0.197375]], rtol=0, atol=1e-6)
    (generated,) = block.generate(X_BFD)
    np.testing.assert_allclose(generated[0].detach().numpy(), [[-0.012497, 0.240831], [0.217581, -0.001312]], rtol=0, atol=1e-6)


def test_golden_products() -> None:
    generator = golden()
    block = FGCNN(
        FGCNN.Config(
            kernel_heights=(3,),
            channels=(1,),
            pool_sizes=(2,),
            new_maps=(1,),
            conv_bias=False,
            share_embedding=False,
            **NO_NORM,
        ),
        fields(4, 4),
    ).double()
    block.load_state_dict(generator.state_dict())
    raw_BFD = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [-1.0, 1.0]]], dtype=torch.float64)
    y_BFD = block(torch.cat([raw_BFD, X_BFD], dim=2))
    assert block.out == FieldLayout(("f0", "f1", "f2", "f3", "fgcnn_0_0", "fgcnn_0_1"), 2)
    assert torch.equal(y_BFD[:, :4], raw_BFD)
    products = InnerProduct(InnerProduct.Config(), block.out)
    expected = [0, 0.5, -1, -0.012497, 0.217581, 0.5, 1, 0.240831, -0.001312, 0]
    expected += [0.114167, 0.108134, 0.253328, -0.218893, -0.003035]
    np.testing.assert_allclose(products(y_BFD)[0, 0, 12:].detach().numpy(), expected, rtol=0, atol=1e-6)
    assert products.out.width == 27


def numbers(tensor: Tensor | None) -> reference.Array | None:
    return None if tensor is None else tensor.detach().numpy()


def norm_of(module: nn.Sequential) -> reference.Norm | None:
    for m in module:
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            return tuple(t.detach().numpy() for t in (m.running_mean, m.running_var, m.weight, m.bias))  # type: ignore[union-attr, return-value]
    return None


def layers_of(block: FGCNN, pool_sizes: tuple[int, ...]) -> list[reference.Layer]:
    layers = []
    for i, size_ in enumerate(pool_sizes):
        convolution = cast(nn.Sequential, block.convolutions[i])
        (conv,) = [m for m in convolution if isinstance(m, nn.Conv2d)]
        recombination = cast(nn.Sequential, block.recombinations[i]) if len(block.recombinations) else nn.Sequential()
        linear = next((m for m in recombination if isinstance(m, nn.Linear)), None)
        layers.append(
            reference.Layer(
                kernel=conv.weight.detach().numpy()[..., 0],
                bias=numbers(conv.bias),
                conv_norm=norm_of(convolution),
                pool_size=size_,
                weight=None if linear is None else numbers(linear.weight),
                recombine_bias=None if linear is None else numbers(linear.bias),
                recombine_norm=norm_of(recombination),
            )
        )
    return layers


def stirred(block: FGCNN) -> FGCNN:
    """Biases and norms away from where they start."""
    for m in block.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
            nn.init.normal_(cast(Tensor, m.running_mean), std=0.1)
            nn.init.uniform_(cast(Tensor, m.running_var), 0.5, 2.0)
        elif isinstance(m, nn.Conv2d) and m.bias is not None:
            nn.init.normal_(m.bias)
    return block


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "without_norms": NO_NORM,
    "even_kernels_and_pools_of_three": {"kernel_heights": (4, 2), "pool_sizes": (3, 2)},
    "kernel_higher_than_the_fields": {"kernel_heights": (9, 7)},
    "without_recombination": {"recombine": False, "new_maps": (2, 3)},
    "biases": {"conv_bias": True},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_the_formula(options: dict[str, Any]) -> None:
    block = stirred(fgcnn(**options))
    layers = layers_of(block, options.get("pool_sizes", (2, 2)))
    x_BFD = randn(4, 5, 3)
    y_BFD = block(x_BFD)
    expected = [np.concatenate([x, *reference.generate(x, layers)[0]]) for x in x_BFD.numpy()]
    assert y_BFD.shape == (4, block.out.num_fields, block.out.dim)
    np.testing.assert_allclose(y_BFD.detach().numpy(), expected, rtol=0, atol=1e-10)
    assert fgcnn(**options, use_raw=False).out == FieldLayout(block.out.names[5:], 3)


def test_floor_pooling_is_told_apart() -> None:
    """Mutation check: with five fields, floor loses the last row, so the formula with ceil no longer holds."""
    ceil, floor = fgcnn(), fgcnn(pooling="floor")
    x = randn(1, 5, 3)
    layers = layers_of(floor, (2, 2))
    expected = np.concatenate([x[0].numpy(), *reference.generate(x[0].numpy(), layers, math.floor)[0]])
    np.testing.assert_allclose(floor(x)[0].detach().numpy(), expected, rtol=0, atol=1e-10)
    assert ceil.out.num_fields == 5 + 3 * 2 + 2 * 1
    assert floor.out.num_fields == 5 + 2 * 2 + 1 * 1
    assert ceil(x).shape != floor(x).shape
    # With equal shapes too: the last field reaches the pooled maps by ceil only.
    one = {"kernel_heights": (1,), "channels": (1,), "pool_sizes": (2,), "new_maps": (1,), "recombine": False, **NO_NORM}
    moved = x.clone()
    moved[0, 4] += 10
    assert not torch.equal(fgcnn(**one)(moved)[:, 5:], fgcnn(**one)(x)[:, 5:])
    assert torch.equal(fgcnn(**one, pooling="floor")(moved)[:, 5:], fgcnn(**one, pooling="floor")(x)[:, 5:])


def pooled(rows: list[float], **options: Any) -> list[float]:
    """The only map, of one kernel of height 1 and weight 1 without activation."""
    config = FGCNN.Config(
        kernel_heights=(1,),
        channels=(1,),
        new_maps=(1,),
        recombine=False,
        use_raw=False,
        activation="none",
        conv_bias=False,
        **NO_NORM,
        **({"pool_sizes": (2,)} | options),
    )
    block = FGCNN(config, fields(len(rows), 1))
    nn.init.ones_(cast(nn.Conv2d, cast(nn.Sequential, block.convolutions[0])[0]).weight)
    return [float(v) for v in block(torch.tensor(rows).view(1, -1, 1)).detach().flatten()]


def test_windows_of_an_odd_height() -> None:
    assert pooled([9.0, -2.0, -3.0]) == [9.0, -3.0]  # {0, 1}, {2}: neither the large first row nor a zero gets into the last
    assert pooled([9.0, -2.0, -3.0], pool_pad="start") == [9.0, -2.0]  # {0}, {1, 2}, as FuxiCTR
    assert pooled([-1.0, -2.0, -3.0], pool_pad="start") == [-1.0, -2.0]  # no zero gets into the first either
    assert pooled([9.0, -2.0, -3.0], pooling="floor") == [9.0]
    assert pooled([1.0, 2.0, 3.0, 4.0, 5.0], pool_sizes=(3,)) == [3.0, 5.0]
    assert pooled([1.0, 2.0, 3.0, 4.0, 5.0], pool_sizes=(3,), pool_pad="start") == [2.0, 5.0]
    assert pooled([-1.0], pool_sizes=(4,)) == [-1.0]


def test_kernel_of_one_row_and_weight_one_is_the_activation() -> None:
    block = fgcnn(kernel_heights=(1,), channels=(1,), pool_sizes=(1,), new_maps=(1,), recombine=False, use_raw=False, **NO_NORM)
    conv = cast(nn.Conv2d, cast(nn.Sequential, block.convolutions[0])[0])
    nn.init.ones_(conv.weight)
    x_BFD = randn(4, 5, 3)
    assert torch.equal(block(x_BFD), x_BFD.tanh())


def test_gradient_reaches_the_generators_vectors_through_the_generated_fields_only() -> None:
    block = fgcnn(FieldLayout(LAYOUT.names, 6), share_embedding=False, **NO_NORM)
    classifier = build(Stack.Config(blocks=(InnerProduct.Config(), MLP.Config(hidden_units=(8, 1)))), block.out).double()
    x_BFD = randn(4, 5, 6)

    def gradients() -> tuple[Tensor, Tensor]:
        x = x_BFD.clone().requires_grad_()
        (grad,) = torch.autograd.grad(classifier(block(x)).sum(), x)
        return grad[:, :, :3], grad[:, :, 3:]

    raw, source = gradients()
    assert raw.any()
    assert source.any()
    for linear in [m for m in block.modules() if isinstance(m, nn.Linear)]:
        nn.init.zeros_(linear.weight)
    raw, source = gradients()
    assert raw.any()
    assert not source.any()
    constant = torch.cat([f[:1] for f in block.generate(x_BFD[:, :, 3:])], dim=1).expand(4, -1, -1)
    torch.testing.assert_close(block(x_BFD), torch.cat([x_BFD[:, :, :3], constant], dim=1), rtol=0, atol=0)


def test_the_order_of_the_fields_matters() -> None:
    x_BFD, order = randn(4, 5, 3), [1, 0, 2, 4, 3]
    variants: tuple[dict[str, Any], ...] = ({}, {"recombine": False, "new_maps": (2, 3)})
    for options in variants:
        block = fgcnn(use_raw=False, **options)
        assert (block(x_BFD[:, order]) - block(x_BFD)).abs().max() > 1e-3
    # Kernels of one row cannot see a permutation inside the windows {0, 1}, {2, 3}, {4} of the first pooling.
    block = fgcnn(use_raw=False, kernel_heights=(1, 1))
    torch.testing.assert_close(block(x_BFD[:, [1, 0, 3, 2, 4]]), block(x_BFD), rtol=0, atol=0)
    assert (block(x_BFD[:, [0, 2, 1, 3, 4]]) - block(x_BFD)).abs().max() > 1e-3


def test_field_order_is_a_permutation_of_the_generators_input() -> None:
    x_BFD = randn(4, 5, 3)
    ordered = fgcnn(field_order=("city", "item", "week", "user", "hour"))
    expected = fgcnn(use_raw=False)(x_BFD[:, [3, 1, 4, 0, 2]])
    torch.testing.assert_close(ordered(x_BFD), torch.cat([x_BFD, expected], dim=1), rtol=0, atol=0)
    with pytest.raises(
        ConfigError, match=r"FGCNN\.field_order names user, item; expected each of the fields once: user, item, h"
    ):
        fgcnn(field_order=("user", "item"))


def test_without_layers_the_model_behind_is_left_alone() -> None:
    """The ablation "no generated fields" is IPNN, bit for bit."""
    none = FGCNN.Config(kernel_heights=(), channels=(), pool_sizes=(), new_maps=())
    rest = (InnerProduct.Config(), MLP.Config(hidden_units=(8, 1)))
    plain = build(Stack.Config(blocks=rest), LAYOUT)
    block = build(Stack.Config(blocks=(none, *rest)), LAYOUT)
    block.load_state_dict({f"blocks.{int(name[7]) + 1}{name[8:]}": p for name, p in plain.state_dict().items()})
    x_BFD = torch.randn(6, 5, 3)
    assert torch.equal(block(x_BFD), plain(x_BFD))


def test_mlp_generator_has_as_many_new_fields() -> None:
    block = fgcnn(generator="mlp", use_raw=False, **NO_NORM)
    assert block.out == fgcnn(use_raw=False).out
    first, second = (cast(nn.Linear, cast(nn.Sequential, layer)[0]) for layer in block.recombinations)
    assert (first.in_features, first.out_features) == (15, 18)  # 5 fields; ⌈5/2⌉ rows of 2 maps
    assert (second.in_features, second.out_features) == (18, 6)
    x_BFD = randn(4, 5, 3)
    h_1 = first(x_BFD.flatten(1)).tanh()
    h_2 = second(h_1).tanh()
    torch.testing.assert_close(block(x_BFD), torch.cat([h_1, h_2], dim=1).view(4, 8, 3), rtol=0, atol=0)
    assert size(fgcnn(generator="mlp")) == size(block) + 2 * (18 + 6)


def test_an_exported_program_rounds_up() -> None:
    """Five fields, unlike the four of the contract tests, leave windows to fill."""
    for pool_pad in ("end", "start"):
        block = fgcnn(pool_pad=pool_pad)
        exported = torch.export.export(block, (randn(4, 5, 3),), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
        assert exported(randn(7, 5, 3)).shape == (7, 5 + 3 * 2 + 2 * 1, 3)
        torch.testing.assert_close(exported(randn(7, 5, 3)), block(randn(7, 5, 3)))


def test_a_batch_of_one_in_eval_mode() -> None:
    block = fgcnn()
    block.train()(randn(8, 5, 3))
    assert block.eval()(randn(1, 5, 3)).isfinite().all()


def test_learns_a_third_order_cross_that_fm_cannot() -> None:
    """The label is the parity of three adjacent bits: uncorrelated with every function of two of them."""
    bits_BF = torch.cartesian_prod(*[torch.tensor([0, 1])] * 3)
    label_B = (bits_BF.sum(dim=1) % 2).float()

    def loss(interaction: Interaction.Config) -> float:
        torch.manual_seed(1)
        vectors = nn.Parameter(torch.randn(3, 2, 4))
        weights = nn.Parameter(torch.zeros(3, 2, 1))
        block, first_order = build(interaction, fields(3, 4)), build(FirstOrder.Config(), fields(3, 1))
        optimizer = torch.optim.Adam([vectors, weights, *block.parameters(), *first_order.parameters()], lr=0.02)
        value = math.inf
        for _ in range(300):
            x_BFD, w_BF1 = (table[torch.arange(3), bits_BF] for table in (vectors, weights))
            logit_B = block(x_BFD).flatten() + first_order(w_BF1).flatten()
            total = nn.functional.binary_cross_entropy_with_logits(logit_B, label_B)
            optimizer.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            value = float(total.detach())
        return value

    generator = FGCNN.Config(kernel_heights=(3,), channels=(4,), pool_sizes=(2,), new_maps=(2,), **NO_NORM)
    assert loss(FM.Config()) > math.log(2) - 1e-3
    assert loss(Stack.Config(blocks=(generator, FM.Config()))) < 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_heights": (0, 1)}, r"FGCNN\.kernel_heights is 0"),
        ({"channels": (0, 1)}, r"FGCNN\.channels is 0"),
        ({"pool_sizes": (2, -1)}, r"FGCNN\.pool_sizes is -1"),
        ({"new_maps": (0, 1)}, r"FGCNN\.new_maps is 0"),
        ({"new_maps": (1,)}, r"have 2, 2, 2, 1 entries; expected one per layer"),
        ({"recombine": False}, r"FGCNN\.recombine is False.*\(2, 3\) and \(2, 1\)"),
        ({"recombine": False, "new_maps": (2, 3), "generator": "mlp"}, r"FGCNN\.recombine is False.*'mlp'"),
        ({"kernel_heights": (), "channels": (), "pool_sizes": (), "new_maps": (), "use_raw": False}, "so nothing is left"),
        ({"pool_sizes": (4, 4), "pooling": "floor"}, r"FGCNN\.pooling is 'floor', which leaves 5 → 1 → 0 rows"),
        ({"use_raw": False, "share_embedding": False}, r"nothing would read the first of a value's two vectors"),
        ({"share_embedding": False}, r"FGCNN reads 2 vectors per value .*but the width is 3"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fgcnn(**options)


def test_generated_fields_start_small() -> None:
    """FM adds up thousands of their pairs."""
    torch.manual_seed(0)
    block = FGCNN(FGCNN.Config(channels=(4, 4, 4, 4)), fields(39, 20))
    generated_BFD = torch.cat(block.generate(0.01 * torch.randn(64, 39, 20)), dim=1).detach()
    assert generated_BFD.std() == pytest.approx(0.1, abs=0.01)
    assert FM(FM.Config(), fields(114, 20))(generated_BFD).std() < 5
