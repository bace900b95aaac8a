"""Published configurations by name: all of them build, say where they come from, and survive JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import nn

from ctrlib.config import Component, ConfigError, from_json, override, to_json
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.presets import COMPONENTS, PRESETS, Flavour, preset
from ctrlib.schema import BatchLayout, SparseColumn
from tests.models.small import LAYOUT, make, rows, with_crosses

CASES = [(name, flavour) for name, p in PRESETS.items() for flavour in p.flavours]
every_preset = pytest.mark.parametrize(("name", "flavour"), CASES)


@every_preset
def test_builds_at_full_size(name: str, flavour: Flavour) -> None:
    assert make(preset(name, flavour))(rows(3)).logits.shape == (3,)


@every_preset
def test_builds_without_memory(name: str, flavour: Flavour) -> None:
    """As for a count of parameters or a check of a config before long work; LAYOUT has every kind of column."""
    with torch.device("meta"):
        model = build_model(preset(name, flavour), with_crosses(LAYOUT))
    assert all(p.is_meta for p in model.parameters())


@every_preset
def test_json_round_trip(name: str, flavour: Flavour) -> None:
    config = preset(name, flavour)
    text = json.dumps(to_json(config))
    assert from_json(json.loads(text), ModelComponent.Config, COMPONENTS) == config


def types(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "type" in node:
            yield node["type"]
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from types(item)


def subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    sub: type[Any]
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def has_forward(cls: type[Any]) -> bool:
    return getattr(cls, "forward", nn.Module.forward) is not nn.Module.forward


def test_components_are_those_of_the_library() -> None:
    used = {name for case in CASES for name in types(to_json(preset(*case)))}
    assert used <= set(COMPONENTS)
    assert all(COMPONENTS[name].__name__ == name for name in COMPONENTS)
    # Every component with a config of its own, presets or not; the abstract ones have no forward to build.
    own = {c for c in subclasses(Component) if c.__module__.startswith("ctrlib.") and has_forward(c)}
    loaded = {c.__name__ for c in own if "Config" in vars(c) and not getattr(c, "__abstractmethods__", None)}
    assert set(COMPONENTS) == loaded


@pytest.mark.parametrize("name", PRESETS)
def test_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    p = PRESETS[name]
    assert p.description
    assert "arXiv:" in p.paper or "doi:" in p.paper
    assert p.flavours[0] == "paper"
    assert set(p.flavours) <= set(get_args(Flavour))
    assert preset(name) == preset(name, "paper")
    assert (p.make.__doc__ or "").strip()


def test_flavours_differ_where_the_publications_do() -> None:
    for name in set(PRESETS) - {"final_mlp"}:
        configs = [preset(name, flavour) for flavour in PRESETS[name].flavours]
        assert all(a != b for i, a in enumerate(configs) for b in configs[:i]), name
    for name in [name for name, p in PRESETS.items() if "fuxictr" in p.flavours]:
        fuxictr = preset(name, "fuxictr")
        assert fuxictr.weight_init == "xavier_normal"
        assert fuxictr.embedding.init_std == 1e-4
        assert fuxictr.embedding.dim == (1 if name == "lr" else 10)


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match=r"no model 'autoin'; did you mean 'autoint'\? \(all: lr, fm, "):
        preset("autoin")
    with pytest.raises(ConfigError, match=r"no model 'zzz' \(all"):
        preset("zzz")
    with pytest.raises(ConfigError, match="'deepfm' has no flavour 'official'; expected one of paper, fuxictr"):
        preset("deepfm", "official")


CRITEO = BatchLayout(tuple(SparseColumn(f"C{i}", 3, f"C{i}") for i in range(39)))


def parameters_without_tables(name: str, flavour: str) -> int:
    model = build_model(preset(name, flavour), CRITEO)
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    return sum(p.numel() for p in model.parameters()) - tables


def test_autoint_has_the_parameters_of_its_paper() -> None:
    # Table 3 has 3.9e4 on Criteo: 4·16·64 + 2·4·64·64 + 39·64 + 1. The released code adds biases and layer norms.
    assert parameters_without_tables("autoint", "paper") == 39_361
    assert parameters_without_tables("autoint", "official") == 40_513
    # FuxiCTR: no residual matrix where the widths agree; 3·10·64 + 10·64 + 2·3·64·64 + 39·64 + 1.
    assert parameters_without_tables("autoint", "fuxictr") == 29_633


def test_autoint_plus_is_autoint_and_a_network() -> None:
    network = 39 * 16 * 400 + 400 + 400 * 400 + 400 + 400 + 1
    assert parameters_without_tables("autoint_plus", "paper") == 39_361 + network
    assert parameters_without_tables("autoint_plus", "official") == 40_513 + network


def test_product_networks_have_the_widths_of_their_papers() -> None:
    pairs, embeddings = 39 * 38 // 2, 39 * 20
    rest = 4 * (700 * 700 + 700) + 5 * 2 * 700 + 700 + 1  # four more layers, five norms, the head
    for name, width in {
        "ipnn": embeddings + pairs,
        "opnn": embeddings + 20 * 20,
        "pnn": embeddings + pairs + 20 * 20,
        "pin": pairs * 5,
    }.items():
        networks = pairs * (60 * 40 + 40 + 40 * 5 + 5) + 2 * 45 if name == "pin" else 0
        assert parameters_without_tables(name, "paper") == networks + width * 700 + 700 + rest, name


def test_fgcnn_has_the_parameters_of_its_paper() -> None:
    # Section 3 for Criteo: convolutions, recombinations, IPNN's MLP; two per map and unit for the norms.
    norms = 2 * (38 + 40 + 42 + 44) + 2 * 2_280 + 2 * (4_096 + 2_048)
    with torch.device("meta"):
        assert parameters_without_tables("fgcnn_ipnn", "paper") == 45_774 + 24_777_480 + 68_558_849 + norms


def test_options_by_path() -> None:
    config = override(preset("deepfm"), {"interaction.streams.1.dropout": "0.1", "embedding.dims.user": "4"}, COMPONENTS)
    changed = to_json(config)
    assert changed["interaction"]["streams"][1]["dropout"] == 0.1
    assert changed["embedding"]["dims"] == {"user": 4}
    build_model(config, LAYOUT)


# Fields, then of ARM-Net and of ARM-Net+: heads, neurons per head, α; depth and width of all MLPs.
ARM_NET = {
    "frappe": (10, (8, 32, 2.0), (4, 4, 1.5), (300, 300), (866_533, 262_957, 122_101)),
    "movielens": (3, (1, 16, 2.0), (1, 8, 2.5), (300, 300), (140_441, 217_425, 101_101)),
    "avazu": (22, (1, 32, 1.5), (8, 8, 2.0), (200, 200, 200), (147_189, 338_981, 126_001)),
    "criteo": (39, (4, 64, 2.0), (4, 32, 2.0), (500, 500), (1_546_957, 1_348_933, 448_501)),
    "diabetes": (43, (32, 1, 1.7), (8, 64, 1.5), (300,), (102_161, 1_696_365, 130_201)),
}


@pytest.mark.parametrize("data", ARM_NET)
def test_arm_net_has_the_parameters_of_its_paper(data: str) -> None:
    """Table 2: ARM-Net, ARM-Net+ and the DNN, without tables."""
    num_fields, single, ensemble, hidden, published = ARM_NET[data]
    layout = BatchLayout(tuple(SparseColumn(f"C{i}", 3, f"C{i}") for i in range(num_fields)))
    counts = []
    for name, (heads, neurons, alpha) in (("arm_net", single), ("arm_net_plus", ensemble)):
        options = {"num_heads": heads, "num_neurons": neurons, "alpha": alpha}
        changes = {f"interaction.blocks.0.{key}": str(value) for key, value in options.items()}
        changes["interaction.blocks.1.hidden_units"] = json.dumps(hidden)
        if name == "arm_net_plus":
            changes["deep.hidden_units"] = json.dumps(hidden)
        counts.append(count(build_model(override(preset(name), changes, COMPONENTS), layout)))
    dnn = override(preset("dnn"), {"interaction.hidden_units": json.dumps(hidden), "interaction.norm": "batch"}, COMPONENTS)
    counts.append(count(build_model(override(dnn, {"embedding.dim": "10"}, COMPONENTS), layout)))
    assert tuple(counts) == published
    if data == "frappe":
        assert counts[:2] == [count(build_model(preset(name), layout)) for name in ("arm_net", "arm_net_plus")]


def count(model: ModelComponent) -> int:
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    return sum(p.numel() for p in model.parameters()) - tables


@pytest.mark.parametrize(("dim", "published"), [(10, 177_421), (100, 953_221)])
def test_arm_net_of_one_head_has_the_parameters_of_its_readme(dim: int, published: int) -> None:
    """Ten neurons behind one shared matrix, two layers of 300, on 5,500 values of Frappe, the table included."""
    layout = BatchLayout(tuple(SparseColumn(f"C{i}", 550, f"C{i}") for i in range(10)))
    options = {"num_heads": "1", "num_neurons": "10", "bilinear": "shared", "scale": "true", "alpha": "1.7"}
    changes = {f"interaction.blocks.0.{name}": value for name, value in options.items()} | {"embedding.dim": str(dim)}
    model = build_model(override(preset("arm_net"), changes, COMPONENTS), layout)
    assert sum(p.numel() for p in model.parameters()) == published
