"""Whole models against formulas from the papers, parameter counts against published logs, and what a config may not say."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError, override
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.autoint import AutoInt
from ctrlib.interactions.compose import Parallel, Stack
from ctrlib.interactions.cross_net import CrossNet, CrossNetV2
from ctrlib.interactions.final_mlp import FinalMLP
from ctrlib.interactions.fm import FM
from ctrlib.interactions.linear import FirstOrder, Linear
from ctrlib.interactions.mlp import MLP
from ctrlib.models.ctr import CTRModel, Head, ModelComponent, build_model
from ctrlib.models.final_mlp import FinalMLPModel
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.schema import BatchLayout, SparseColumn
from tests.models.small import LAYOUT, awake, make, rows, shrunk
from tests.reference.dcn import dcn
from tests.reference.deepfm import deepfm

Array = npt.NDArray[np.float64]


def numbers(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()


def embedded(module: FeatureEmbedding) -> Array:
    return numbers(module(rows(6)))


def layers(module: nn.Module) -> list[tuple[Array, Array]]:
    return [(numbers(m.weight), numbers(m.bias)) for m in module.modules() if isinstance(m, nn.Linear)]


def test_lr_and_fm_are_their_sums() -> None:
    for name in ("lr", "fm"):
        model = cast(CTRModel, awake(make(shrunk(preset(name)))))
        logits = numbers(model(rows(6)).logits)
        x_BFD = embedded(model.embedding)
        bias = next(p for n, p in model.named_parameters() if n.endswith(".bias") and p.shape == (1,)).item()
        if name == "lr":
            assert x_BFD.shape == (6, 7, 1)
            expected = [bias + sum(x.flatten()) for x in x_BFD]
        else:
            assert model.first_order is not None
            first = embedded(cast(FeatureEmbedding, model.first_order[0]))
            assert first.shape == (6, 7, 1)
            pairs = [sum(float(x[i] @ x[j]) for i in range(7) for j in range(i)) for x in x_BFD]
            expected = [bias + float(w.sum()) + pair for w, pair in zip(first, pairs, strict=True)]
        np.testing.assert_allclose(logits, expected, rtol=1e-4)


def test_deepfm_is_the_paper_formula() -> None:
    model = cast(CTRModel, awake(make(shrunk(preset("deepfm"), dropout=0.0))))
    assert model.first_order is not None
    first, x_BFD = embedded(cast(FeatureEmbedding, model.first_order[0])), embedded(model.embedding)
    *hidden, last = layers(model.interaction)
    expected = [deepfm(w[:, 0], x, hidden, last) for w, x in zip(first, x_BFD, strict=True)]
    np.testing.assert_allclose(numbers(model(rows(6)).logits), expected, rtol=1e-4)


@pytest.mark.parametrize("version", [1, 2])
def test_dcn_is_the_paper_formula(version: Literal[1, 2]) -> None:
    cross: CrossNet.Config | CrossNetV2.Config = (
        CrossNet.Config(num_layers=2) if version == 1 else CrossNetV2.Config(num_layers=2)
    )
    interaction = Parallel.Config(streams=(cross, MLP.Config(hidden_units=(5,))), fusion="concat")
    config = CTRModel.Config(embedding=FeatureEmbedding.Config(dim=3, init_std=0.5), interaction=interaction)
    model = cast(CTRModel, awake(make(config)))
    block, deep = cast(nn.ModuleList, model.interaction.streams)
    if version == 1:
        weights = [numbers(cast(nn.Linear, w).weight)[0] for w in cast(nn.ModuleList, block.weights)]
        biases = [numbers(b) for b in cast(nn.ParameterList, block.biases)]
    else:
        weights, biases = map(list, zip(*layers(block), strict=True))
    (last,) = layers(cast(nn.Module, model.head))
    expected = [dcn(x, version, (weights, biases), layers(deep), last) for x in embedded(model.embedding)]
    np.testing.assert_allclose(numbers(model(rows(6)).logits), expected, rtol=1e-4)


def test_net_is_the_model_without_first_order_term() -> None:
    model = cast(CTRModel, make(shrunk(preset("deepfm"))))
    assert model.first_order is not None
    wide, total = model.first_order
    batch = rows(6)
    expected = model.net(model.embedding(batch)) + total(wide(batch)).flatten()
    torch.testing.assert_close(model(batch).logits, expected)


def sizes(*vocab_sizes: int, names: tuple[str, ...]) -> BatchLayout:
    return BatchLayout(tuple(SparseColumn(n, v, n) for n, v in zip(names, vocab_sizes, strict=True)))


FRAPPE_FIELDS = ("user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
FRAPPE_SIZES = (956, 4084, 9, 9, 4, 5, 4, 11, 82, 235)
# FuxiCTR 2: padding and OOV rows, as here; FuxiCTR 1: no padding row.
FRAPPE_2 = sizes(*FRAPPE_SIZES, names=FRAPPE_FIELDS)
FRAPPE_1 = sizes(*(v - 1 for v in FRAPPE_SIZES), names=FRAPPE_FIELDS)
MOVIELENS_2 = sizes(16_977, 23_606, 49_659, names=("user_id", "item_id", "tag_id"))
MOVIELENS_1 = sizes(16_976, 23_605, 49_658, names=("user_id", "item_id", "tag_id"))


def count(config: ModelComponent.Config, layout: BatchLayout) -> int:
    return sum(p.numel() for p in build_model(config, layout).parameters())


@pytest.mark.parametrize(
    ("name", "layout", "parameters"),
    [
        ("lr", FRAPPE_1, 5_390),
        ("fm", FRAPPE_1, 59_280),
        ("dnn", FRAPPE_1, 417_891),  # a single MLP: the logged 781,892 have two
        ("wide_deep", FRAPPE_1, 423_280),
        ("deepfm", FRAPPE_1, 423_280),
        ("dcn", FRAPPE_1, 418_591),
        ("dcnv2", FRAPPE_1, 458_391),
        ("autoint", FRAPPE_1, 306_051),
        ("autoint_plus", FRAPPE_1, 622_180),
        ("final_mlp", FRAPPE_2, 253_392),
        ("dual_mlp", FRAPPE_2, 972_992),
    ],
)
def test_frappe_experiments_have_the_published_parameters(name: str, layout: BatchLayout, parameters: int) -> None:
    root = Path(__file__).resolve().parents[2]
    experiment: Callable[[], Any] = runpy.run_path(str(root / "experiments" / "frappe" / f"{name}.py"))["experiment"]
    assert count(experiment().config.model, layout) == parameters
    if name != "dnn":
        assert experiment().published["parameters"] == parameters


EMBEDDING = FeatureEmbedding.Config(dim=10, init_std=1e-4)
DEEP = MLP.Config(hidden_units=(400, 400, 400), norm="batch", output_dim=1)
DEEP_VECTOR = replace(DEEP, output_dim=None)
ATTENTION = AutoInt.Config(num_layers=2, num_heads=4, head_dim=32, residual="linear_if_needed", scale=True, norm="before_relu")
WIDE = FirstOrder.Config(bias=False)


def ctr(*streams: Any, fusion: Literal["sum", "concat"] = "sum", **options: Any) -> CTRModel.Config:
    head = Head.Config() if fusion == "concat" else None
    interaction = Parallel.Config(streams=streams, fusion=fusion)
    return CTRModel.Config(embedding=EMBEDDING, interaction=interaction, head=head, **options)


def fuxictr(name: str, **options: str) -> ModelComponent.Config:
    """The preset with options set as on the command line, dots written as two underscores."""
    return override(preset(name, "fuxictr"), {path.replace("__", "."): text for path, text in options.items()}, COMPONENTS)


FWFM = fuxictr("fwfm", interaction__linear="value", vectors="2")
FMFM = fuxictr("fmfm", interaction__kernel="vector")


FINAL_MLP = FinalMLP.Config(
    mlp1=MLP.Config(hidden_units=(400,), norm="batch"),
    mlp2=MLP.Config(hidden_units=(800,), norm="batch"),
    fs_hidden_units=(800,),
    num_heads=10,
)
MOVIELENS: dict[str, tuple[ModelComponent.Config, BatchLayout, int]] = {
    "lr": (preset("lr", "fuxictr"), MOVIELENS_1, 90_240),
    "fm": (preset("fm", "fuxictr"), MOVIELENS_1, 992_630),
    "dnn": (ctr(DEEP), MOVIELENS_1, 1_238_391),
    "wide_deep": (ctr(DEEP, first_order=WIDE), MOVIELENS_1, 1_328_630),
    "deepfm": (ctr(FM.Config(), DEEP, first_order=WIDE), MOVIELENS_1, 1_328_630),
    "dcn": (ctr(CrossNet.Config(num_layers=4), DEEP_VECTOR, fusion="concat"), MOVIELENS_1, 1_238_661),
    "dcnv2": (ctr(CrossNetV2.Config(num_layers=5), DEEP_VECTOR, fusion="concat"), MOVIELENS_1, 1_243_071),
    "autoint": (ctr(ATTENTION, fusion="concat", first_order=WIDE), MOVIELENS_1, 1_047_798),
    "autoint_plus": (
        ctr(Stack.Config(blocks=(ATTENTION, Linear.Config())), DEEP, first_order=WIDE),
        MOVIELENS_1,
        1_383_799,
    ),
    "final_mlp": (FinalMLPModel.Config(embedding=EMBEDDING, block=FINAL_MLP), MOVIELENS_2, 1_040_902),
    "dual_mlp": (
        ctr(DEEP, MLP.Config(hidden_units=(400,), norm="batch", output_dim=1)),
        MOVIELENS_2,
        1_252_022,
    ),
    "ipnn": (preset("ipnn", "fuxictr"), MOVIELENS_1, 1_237_191),
    "fwfm": (FWFM, MOVIELENS_1, 1_804_784),
    "fmfm": (FMFM, MOVIELENS_1, 992_660),
    "ffm": (preset("ffm", "fuxictr"), MOVIELENS_1, 1_895_020),
    "hofm": (fuxictr("hofm", interaction__share_embedding="true", vectors="1"), MOVIELENS_1, 992_630),
}


@pytest.mark.parametrize("name", MOVIELENS)
def test_movielens_models_have_the_published_parameters(name: str) -> None:
    config, layout, parameters = MOVIELENS[name]
    assert count(config, layout) == parameters


def test_fuxictr_presets_are_the_published_architectures() -> None:
    # Where BARS' Frappe settings are FuxiCTR's defaults (dropout and L2 add no parameters).
    for name, parameters in {"dnn": 417_891, "wide_deep": 423_280, "deepfm": 423_280, "dcn": 418_591, "dcnv2": 458_391}.items():
        assert count(preset(name, "fuxictr"), FRAPPE_1) == parameters
    assert count(preset("ipnn", "fuxictr"), FRAPPE_1) == 433_491
    assert count(preset("ffm", "fuxictr"), FRAPPE_1) == 490_400
    assert count(preset("hofm", "fuxictr"), FRAPPE_1) == 113_170
    assert count(FWFM, FRAPPE_1) == 107_826  # not its default
    assert count(FMFM, FRAPPE_1) == 59_730  # likewise


def test_first_order_weights_do_not_follow_the_vectors_options() -> None:
    embedding = FeatureEmbedding.Config(dim=3, dims={"user": 5}, frozen=("item",), token_dropout=0.1, fields=("user", "item"))
    config = CTRModel.Config(embedding=embedding, interaction=MLP.Config(hidden_units=(4, 1)), head=None, first_order=WIDE)
    model = cast(CTRModel, make(config))
    assert model.first_order is not None
    wide = cast(FeatureEmbedding, model.first_order[0])
    assert wide.out.names == ("user", "item")
    assert {name: p.shape for name, p in wide.named_parameters()} == {"tables.0.rows.weight": (9 + 12, 1)}
    assert all(p.requires_grad for p in wide.parameters())
    assert wide.config.token_dropout == 0.1  # or its OOV weight would never learn


@pytest.mark.parametrize(("scheme", "uniform"), [("xavier_normal", False), ("xavier_uniform", True)])
def test_weight_init(scheme: Any, uniform: bool) -> None:
    torch.manual_seed(1)
    embedding = FeatureEmbedding.Config(dim=16)
    model = build_model(CTRModel.Config(embedding=embedding, interaction=MLP.Config(), weight_init=scheme), LAYOUT)
    for linear in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        assert not linear.bias.any()
        deviation = math.sqrt(2 / (linear.in_features + linear.out_features))
        weight = linear.weight.detach()
        assert float(weight.std()) == pytest.approx(deviation, rel=0.1)
        assert (float(weight.abs().max()) <= deviation * math.sqrt(3)) == uniform


def test_torch_init_is_left_alone() -> None:
    model = make(CTRModel.Config(interaction=MLP.Config(hidden_units=(64,))))
    (first, _) = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert float(first.bias.detach().abs().max()) > 0
    assert float(first.weight.detach().abs().max()) <= 1 / math.sqrt(first.in_features)


def test_head_none_needs_one_logit() -> None:
    with pytest.raises(ConfigError, match=r"AutoInt returns 7 fields of width 64: give a head"):
        build_model(CTRModel.Config(interaction=AutoInt.Config(), head=None), LAYOUT)
    with pytest.raises(ConfigError, match="MLP returns 1 fields of width 400"):
        build_model(CTRModel.Config(head=None), LAYOUT)


def test_head_without_bias() -> None:
    config = CTRModel.Config(interaction=MLP.Config(hidden_units=(6,)), head=Head.Config(bias=False))
    assert cast(nn.Linear, cast(nn.Module, cast(CTRModel, make(config)).head).linear).bias is None


TWO_LABELS = replace(LAYOUT, labels=("click", "buy"))


@pytest.mark.parametrize("options", [{"first_order": WIDE}, {"head": None, "interaction": MLP.Config(output_dim=1)}])
def test_several_labels_need_a_head_alone(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"2 labels \(click, buy\).*one logit") as error:
        build_model(CTRModel.Config(**options), TWO_LABELS)
    listed = str(error.value).split("(")[-1].split(")")[0].split(", ")
    for name in listed:  # the models that the message recommends do work
        assert make(shrunk(preset(name)), TWO_LABELS)(rows(3)).logits.shape == (3, 2)


# Presets of the benchmark code's architectures, and what the MovieLens runs set otherwise.
FRAPPE_PRESETS: dict[str, tuple[dict[str, str], int]] = {
    "cin": ({}, 147_984),
    "xdeepfm": ({}, 429_809),
    "cross_net_v2": ({}, 94_391),
    "fibinet": ({}, 743_480),
    "mask_net_parallel": ({}, 571_691),
    "edcn": ({}, 86_351),
    "fignn": ({"interaction.blocks.0.num_layers": "17", "interaction.blocks.0.gru": "False"}, 89_090),
}
MOVIELENS_PRESETS: dict[str, tuple[dict[str, str], int]] = {
    "cin": ({"interaction.hidden_units": "32,32,32,32"}, 1_002_390),
    "xdeepfm": (
        {"interaction.streams.0.blocks.0.hidden_units": "64,64,64", "interaction.streams.1.norm": "none"},
        1_351_767,
    ),
    "cross_net_v2": ({"interaction.num_layers": "8"}, 909_861),
    "fibinet": ({"interaction.blocks.0.senet.reduction_ratio": "0.3"}, 1_340_790),
    "mask_net_serial": ({}, 2_624_541),
    "edcn": ({"interaction.num_layers": "2", "interaction.regulation": "False"}, 904_701),
    "fignn": ({"interaction.blocks.0.num_layers": "13", "interaction.blocks.0.gru": "False"}, 910_440),
}


@pytest.mark.parametrize("name", FRAPPE_PRESETS)
def test_presets_have_the_published_parameters_on_frappe(name: str) -> None:
    options, parameters = FRAPPE_PRESETS[name]
    assert count(override(preset(name, "fuxictr"), options, COMPONENTS), FRAPPE_1) == parameters


@pytest.mark.parametrize("name", MOVIELENS_PRESETS)
def test_presets_have_the_published_parameters_on_movielens(name: str) -> None:
    options, parameters = MOVIELENS_PRESETS[name]
    assert count(override(preset(name, "fuxictr"), options, COMPONENTS), MOVIELENS_1) == parameters
