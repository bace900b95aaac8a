from __future__ import annotations

import itertools
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.hiformer import Hiformer, HiformerLayer
from ctrlib.interactions.token_linear import Composite, TokenLinear, TokenNorm
from ctrlib.schema import FieldLayout
from tests.reference import hiformer as reference

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 6)
SMALL: dict[str, Any] = {"num_heads": 2, "key_dim": 2, "value_dim": 5, "ffn_dim": 7, "rank_key": 3, "rank_value": 4}
BARE: dict[str, Any] = {"residual": False, "norm": "none", "ffn": "none", "prune_last": False}
FULL: dict[str, Any] = {"rank_key": None, "rank_value": None}
KINDS: dict[str, dict[str, Any]] = {
    "shared": {"attention": "shared", "ffn": "shared"},
    "hetero": {"attention": "hetero"},
    "composite": {},
    "full_composite": FULL,
    "composite_query": {"composite": ("q", "k", "v"), **FULL},
    "factors_per_head": {"share_factors": False},
    "values_only": {"composite": ("v",)},
}
every_kind = pytest.mark.parametrize("kind", KINDS)

CONTRACT: dict[str, Interaction.Config] = {
    "hiformer": Hiformer.Config(num_heads=2, key_dim=3, value_dim=4, rank_key=5, rank_value=6, ffn_dim=8, dropout=0.2),
    "hiformer_full": Hiformer.Config(
        composite=("q", "k", "v"),
        rank_key=None,
        rank_value=None,
        num_layers=2,
        prune_last=False,
        norm="pre",
        position_bias=True,
    ),
    "hiformer_factors_per_head": Hiformer.Config(rank_key=3, rank_value=4, share_factors=False, norm="none", num_tasks=2),
    "hetero_att": Hiformer.Config(attention="hetero", num_layers=2, norm="pre", norm_per_token=True, attention_dropout=0.2),
    "transformer": Hiformer.Config(attention="shared", ffn="shared", num_layers=2, norm="pre"),
}


def hiformer(layout: FieldLayout = LAYOUT, **options: Any) -> Hiformer:
    return Hiformer(Hiformer.Config(**(SMALL | options)), layout).double()


def layer(block: Hiformer, i: int = 0) -> HiformerLayer:
    return cast(HiformerLayer, block.layers[i])


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def awake(block: Hiformer) -> Hiformer:
    """Norms have gains and shifts that are seen."""
    for p in block.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return block


def plain(module: nn.Module, tokens: int) -> reference.Array:
    """The weights of a linear layer, one [in, out] per token."""
    if isinstance(module, TokenLinear):
        values: reference.Array = module.weight.detach().numpy()
        return values
    weight: reference.Array = cast(nn.Linear, module).weight.detach().numpy().T
    return np.stack([weight] * tokens)


def bias(module: nn.Module, tokens: int) -> reference.Array:
    values = cast(Tensor, module.bias).detach().numpy()
    return values if isinstance(module, TokenLinear | TokenNorm) else np.stack([values] * tokens)


def composite(module: Composite) -> reference.Array:
    """M [L·D, n, H·d], multiplied out with loops where it has factors."""
    count, heads, dim = module.shape
    if isinstance(module.linear, nn.Sequential):
        first, last = (cast(nn.Linear, m).weight.detach().numpy().T for m in module.linear)
        product: reference.Array = first @ last
        return product.reshape(-1, count, heads * dim)
    first = cast(nn.Linear, module.linear).weight.detach().numpy().T
    if module.per_head is None:
        return first.reshape(-1, count, heads * dim)
    last = module.per_head.weight.detach().numpy()
    rank = last.shape[1]
    matrix = np.zeros((len(first), count, heads * dim))
    for h, j, a in itertools.product(range(heads), range(count), range(dim)):
        matrix[:, j, h * dim + a] = first[:, h * rank : (h + 1) * rank] @ last[h, :, j * dim + a]
    return matrix


def row_convention(it: HiformerLayer) -> reference.Weights:
    projections = {"q": it.query, "k": it.key, "v": it.value}
    counts = {"q": it.num_outputs, "k": it.num_tokens, "v": it.num_tokens}
    ffn = norms = None
    if it.ffn is not None:
        first, _, last = cast(nn.Sequential, it.ffn)
        q = it.num_outputs
        ffn = (plain(first, q), bias(first, q), plain(last, q), bias(last, q))
        if not isinstance(it.norm_attention, nn.Identity):
            parts = []
            for norm, tokens in ((it.norm_attention, it.num_tokens), (it.norm_ffn, q)):
                gain = cast(Tensor, norm.weight).detach().numpy()
                parts += [gain if isinstance(norm, TokenNorm) else np.stack([gain] * tokens), bias(norm, tokens)]
            norms = cast(tuple[reference.Array, reference.Array, reference.Array, reference.Array], tuple(parts))
    query, key, value = (composite(p) if isinstance(p, Composite) else plain(p, counts[n]) for n, p in projections.items())
    return reference.Weights(
        query,
        key,
        value,
        output=plain(it.output, it.num_outputs),
        composite=tuple(name for name, p in projections.items() if isinstance(p, Composite)),
        ffn=ffn,
        norms=norms,
    )


def by_the_formula(block: Hiformer, x_BFD: Tensor, **options: Any) -> tuple[reference.Array, list[reference.Array]]:
    """Output, and the attention of every layer."""
    outputs, shown = [], []
    for x in block.tokens(x_BFD).detach().numpy():
        maps = []
        for i in range(len(block.layers)):
            it = layer(block, i)
            x, attention = reference.layer(x, row_convention(it), it.num_heads, it.num_outputs, **options)
            maps.append(attention)
        outputs.append(x)
        shown.append(maps)
    return np.stack(outputs), [np.stack(maps) for maps in zip(*shown, strict=True)]


def set_weight(module: nn.Module, values: Any) -> None:
    weight = cast(nn.Parameter, module.weight)
    weight.data.copy_(torch.as_tensor(values, dtype=torch.float64).reshape(weight.shape))


E_BFD = torch.tensor([[[2.0]]], dtype=torch.float64)  # the second token is the task's


def golden(**options: Any) -> Hiformer:
    one: dict[str, Any] = {"num_heads": 1, "key_dim": 1, "value_dim": 1}
    block = hiformer(FieldLayout(("a",), 1), **one, **BARE, **options)
    block.tasks.data.fill_(1.0)
    set_weight(layer(block).query, [0.5, -1.0])
    set_weight(layer(block).output, [1.0, 1.0])
    return block


def test_golden_values_of_hetero_att() -> None:
    block = golden(attention="hetero")
    set_weight(layer(block).key, [1.0, 0.5])
    set_weight(layer(block).value, [1.0, 4.0])
    attention = block.explain(E_BFD)["attention/0"][0, 0].detach().numpy()
    np.testing.assert_allclose(attention, [[0.817574, 0.182426], [0.182426, 0.817574]], rtol=0, atol=1e-6)
    np.testing.assert_allclose(block(E_BFD).detach().numpy().ravel(), [2.364851, 3.635149], rtol=0, atol=1e-6)


def test_golden_values_of_hiformer() -> None:
    block = golden(**FULL)
    set_weight(cast(Composite, layer(block).key).linear, [[1.0, 1.0], [0.5, -0.5]])  # rows are outputs
    set_weight(cast(Composite, layer(block).value).linear, [[1.0, 2.0], [-1.0, 4.0]])
    tokens = block.tokens(E_BFD)
    assert layer(block).key(tokens).flatten().tolist() == [3.0, 0.5]
    assert layer(block).value(tokens).flatten().tolist() == [4.0, 2.0]
    attention = block.explain(E_BFD)["attention/0"][0, 0].detach().numpy()
    np.testing.assert_allclose(attention, [[0.924142, 0.075858], [0.075858, 0.924142]], rtol=0, atol=1e-6)
    np.testing.assert_allclose(block(E_BFD).detach().numpy().ravel(), [3.848284, 2.151716], rtol=0, atol=1e-6)


def test_golden_values_of_rank_one() -> None:
    block = golden(rank_key=1, rank_value=1)
    first, last = cast(nn.Sequential, cast(Composite, layer(block).key).linear)
    set_weight(first, [1.0, 0.5])
    set_weight(last, [0.4, 0.2])
    np.testing.assert_allclose(layer(block).key(block.tokens(E_BFD)).detach().numpy().ravel(), [1.0, 0.5], rtol=0, atol=1e-12)


@every_kind
@pytest.mark.parametrize("prune", [True, False])
def test_equals_the_formula(kind: str, prune: bool) -> None:
    torch.manual_seed(1)
    block = awake(hiformer(num_layers=2, num_tasks=2, prune_last=prune, **KINDS[kind]))
    x_BFD = randn(2, 4, 6)
    expected, maps = by_the_formula(block, x_BFD)
    tasks = ("task_0", "task_1")
    assert block.out == FieldLayout(tasks if prune else LAYOUT.names + tasks, 6)
    np.testing.assert_allclose(block(x_BFD).detach().numpy(), expected, rtol=0, atol=1e-10)
    shown = block.explain(x_BFD)
    assert list(shown) == ["attention/0", "attention/1"]
    assert shown["attention/0"].shape == (2, 2, 6, 6)
    assert shown["attention/1"].shape == (2, 2, 2 if prune else 6, 6)
    for i, attention in enumerate(maps):
        np.testing.assert_allclose(shown[f"attention/{i}"].detach().numpy(), attention, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "pre"},
        {"norm": "none"},
        {"residual": False},
        {"norm_per_token": True},
        {"norm": "pre", "norm_per_token": True, "ffn": "shared"},
        {"position_bias": True},
        {"norm": "none", "ffn": "none"},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_options_equal_the_formula(options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    block = awake(hiformer(num_layers=2, attention="hetero", **options))
    x_BFD = randn(2, 4, 6)
    expected, _ = by_the_formula(block, x_BFD, norm=options.get("norm", "post"), residual=options.get("residual", True))
    np.testing.assert_allclose(block(x_BFD).detach().numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mutation", ["scale", "residual"])
def test_a_wrong_layer_would_be_seen(mutation: str) -> None:
    torch.manual_seed(3)
    block = awake(hiformer())
    x_BFD = randn(2, 4, 6)
    expected, _ = by_the_formula(block, x_BFD)
    if mutation == "scale":
        layer(block).scale = 1.0
    else:
        layer(block).has_residual = False
    assert np.abs(block(x_BFD).detach().numpy() - expected).max() > 1e-3


def test_position_bias_is_added_to_the_tokens() -> None:
    block = hiformer(position_bias=True)
    assert block.position is not None
    x_BFD = randn(3, 4, 6)
    tokens = block.tokens(x_BFD)
    torch.testing.assert_close(tokens[:, :4], x_BFD + block.position[:4], rtol=0, atol=1e-12)
    torch.testing.assert_close(tokens[:, 4:], (block.tasks + block.position[4:]).expand(3, 1, 6), rtol=0, atol=1e-12)


def test_tied_weights_are_torch_multihead_attention() -> None:
    torch.manual_seed(4)
    oracle = nn.MultiheadAttention(6, 2, bias=False, batch_first=True).double()
    for kind in ("shared", "hetero"):
        options: dict[str, Any] = {"key_dim": 3, "value_dim": 3, **BARE}
        block = hiformer(attention=kind, **options)
        it = layer(block)
        parts = [*oracle.in_proj_weight.detach().chunk(3), oracle.out_proj.weight.detach()]
        for module, weight in zip((it.query, it.key, it.value, it.output), parts, strict=True):
            set_weight(module, weight if kind == "shared" else weight.T.expand(5, 6, 6))
        x_BLD = block.tokens(randn(3, 4, 6))
        expected, attention = oracle(x_BLD, x_BLD, x_BLD, average_attn_weights=False)
        torch.testing.assert_close(it(x_BLD), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(it.attention(x_BLD), attention, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_shared_is_torch_encoder_layer(norm: Literal["post", "pre"]) -> None:
    torch.manual_seed(5)
    oracle = nn.TransformerEncoderLayer(6, 2, 24, 0.0, "gelu", batch_first=True, norm_first=norm == "pre").double().train()
    block = hiformer(attention="shared", ffn="shared", ffn_dim=None, key_dim=3, value_dim=3, norm=norm, prune_last=False)
    it = layer(block)
    assert it.ffn is not None
    first, _, last = cast(nn.Sequential, it.ffn)
    query, key, value = oracle.self_attn.in_proj_weight.detach().chunk(3)
    for module, weight in ((it.query, query), (it.key, key), (it.value, value), (it.output, oracle.self_attn.out_proj.weight)):
        set_weight(module, weight.detach())
    pairs = ((first, oracle.linear1), (last, oracle.linear2), (it.norm_attention, oracle.norm1), (it.norm_ffn, oracle.norm2))
    for mine, theirs in pairs:
        nn.init.normal_(theirs.bias)
        mine.load_state_dict(theirs.state_dict())
    x_BLD = block.tokens(randn(3, 4, 6))
    torch.testing.assert_close(it(x_BLD), oracle(x_BLD), rtol=0, atol=1e-12)


def test_block_diagonal_composites_are_hetero_att() -> None:
    torch.manual_seed(6)
    plain_block, block = hiformer(attention="hetero", num_layers=2), hiformer(num_layers=2, **FULL)
    state = plain_block.state_dict()
    for i, name in itertools.product(range(2), ("key", "value")):
        weight = state.pop(f"layers.{i}.{name}.weight")  # [L, D, A]
        state[f"layers.{i}.{name}.linear.weight"] = torch.block_diag(*weight).T  # type: ignore[no-untyped-call]
    block.load_state_dict(state)
    x_BFD = randn(3, 4, 6)
    torch.testing.assert_close(block(x_BFD), plain_block(x_BFD), rtol=0, atol=1e-12)


def test_low_rank_by_singular_values() -> None:
    torch.manual_seed(7)
    full = hiformer(**FULL)
    module = cast(Composite, layer(full).value)
    matrix = cast(nn.Linear, module.linear).weight.detach().T  # [L·D, L·H·d]
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    x_BFD = randn(3, 4, 6)
    for rank in (len(s), 8):
        block = hiformer(rank_key=None, rank_value=rank)
        state = full.state_dict()
        state.pop("layers.0.value.linear.weight")
        state["layers.0.value.linear.0.weight"] = (u[:, :rank] * s[:rank]).T
        state["layers.0.value.linear.1.weight"] = vt[:rank].T
        block.load_state_dict(state)
        found = cast(Composite, layer(block).value).matrix().flatten(1)
        assert (found - matrix).norm().item() == pytest.approx(s[rank:].norm().item(), abs=1e-10)
        if rank == len(s):
            torch.testing.assert_close(block(x_BFD), full(x_BFD), rtol=0, atol=1e-10)


@every_kind
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_pruning_changes_nothing_but_what_is_computed(kind: str, norm: Literal["post", "pre"]) -> None:
    options = {**KINDS[kind], "num_layers": 2, "num_tasks": 2, "norm": norm, "norm_per_token": kind == "hetero"}
    full, pruned = awake(hiformer(prune_last=False, **options)), hiformer(**options)
    state = full.state_dict()
    for name, value in pruned.state_dict().items():
        if value.shape != state[name].shape:  # only task tokens, the last ones
            assert name.split(".")[1] == "1"
            state[name] = state[name][len(state[name]) - len(value) :]
    pruned.load_state_dict(state)
    x_BFD = randn(3, 4, 6)
    torch.testing.assert_close(pruned(x_BFD), full(x_BFD)[:, 4:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["hetero", "full_composite"])
def test_fields_and_their_weights_permute_together(kind: str) -> None:
    torch.manual_seed(8)
    options = {**KINDS[kind], "prune_last": False, "norm_per_token": True, "position_bias": True}
    block, moved = awake(hiformer(**options)), hiformer(**options)
    order, tokens = [2, 0, 3, 1], [2, 0, 3, 1, 4]
    x_BFD = randn(3, 4, 6)
    y_BLD = block(x_BFD)
    assert (block(x_BFD[:, order]) - y_BLD[:, tokens]).abs().max() > 1e-2  # with fixed weights it does matter
    state = block.state_dict()
    for name, value in state.items():
        if name.endswith("linear.weight"):  # [n·A, L·D] of a composite
            state[name] = value.view(5, -1, 5, 6)[tokens][:, :, tokens].reshape(value.shape)
        elif name != "tasks":
            state[name] = value[tokens]
    moved.load_state_dict(state)
    torch.testing.assert_close(moved(x_BFD[:, order]), y_BLD[:, tokens], rtol=0, atol=1e-12)


def test_what_a_score_depends_on() -> None:
    """Of HeteroAtt the pair alone; of Hiformer every token."""
    x_BLD = randn(1, 5, 6).requires_grad_()
    for options, touched in ((KINDS["hetero"], [1, 3]), (KINDS["composite"], [0, 1, 2, 3, 4])):
        it = layer(hiformer(prune_last=False, **options))
        score = (it.heads(it.query(x_BLD))[:, :, 1] * it.heads(it.key(x_BLD))[:, :, 3]).sum()
        (gradient,) = torch.autograd.grad(score, x_BLD)
        assert [i for i in range(5) if gradient[0, i].any()] == touched


def test_zero_tokens_leave_the_biases() -> None:
    torch.manual_seed(9)
    block = hiformer(norm="none", attention="hetero")
    nn.init.zeros_(block.tasks)
    x_BFD = torch.zeros(2, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(
        block.explain(x_BFD)["attention/0"], torch.full((2, 2, 1, 5), 0.2, dtype=torch.float64), rtol=0, atol=1e-12
    )
    it = layer(block)
    assert it.ffn is not None
    first, _, last = (cast(TokenLinear, m) for m in cast(nn.Sequential, it.ffn))
    assert first.bias is not None
    assert last.bias is not None
    expected = F.gelu(first.bias) @ last.weight[0] + last.bias
    torch.testing.assert_close(block(x_BFD), expected.expand(2, 1, 6), rtol=0, atol=1e-12)


def test_task_tokens_ask_for_themselves_but_see_each_other() -> None:
    block = hiformer(num_tasks=2, attention="hetero")
    y_BTD = block(randn(3, 4, 6))
    query, tasks = torch.autograd.grad(
        y_BTD[:, 0].square().sum() + y_BTD[:, 0, 0].sum(), [cast(TokenLinear, layer(block).query).weight, block.tasks]
    )
    assert query[0].any()
    assert not query[1].any()
    assert tasks.any(dim=1).all()


def test_smallest_sizes() -> None:
    block = hiformer(FieldLayout(("only",), 6), num_tasks=3, num_heads=1, key_dim=1, value_dim=7)
    assert block(randn(2, 1, 6)).shape == (2, 3, 6)


def test_token_linear_is_a_loop_over_tokens() -> None:
    module = TokenLinear(4, 6, 3, bias=True).double()
    x_BLD = randn(5, 4, 6)
    assert module.bias is not None
    expected = torch.stack([x_BLD[:, i] @ module.weight[i] + module.bias[i] for i in range(4)], dim=1)
    torch.testing.assert_close(module(x_BLD), expected, rtol=0, atol=1e-12)


def test_token_linear_starts_as_torch_linear_does() -> None:
    weight = TokenLinear(50, 16, 32, bias=False).weight.detach()
    assert float(weight.abs().max()) <= 0.25
    assert float(weight.std()) == pytest.approx(0.25 / 3**0.5, rel=0.05)


def test_token_norm_is_layer_norm_with_a_gain_per_token() -> None:
    module = TokenNorm(4, 6).double()
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    x_BLD = randn(5, 4, 6)
    for i in range(4):
        expected = F.layer_norm(x_BLD[:, i], (6,), module.weight[i], module.bias[i])
        torch.testing.assert_close(module(x_BLD)[:, i], expected, rtol=0, atol=1e-12)


def test_pair_strengths() -> None:
    block = hiformer(attention="hetero", num_layers=2)
    shown = block.strengths()
    assert list(shown) == ["pair/0", "pair/1"]
    assert shown["pair/1"].shape == (2, 1, 5)
    query, key = (cast(TokenLinear, m).weight.detach() for m in (layer(block).query, layer(block).key))
    for h, i, j in itertools.product(range(2), range(5), range(5)):
        expected = (query[i, :, 2 * h : 2 * h + 2] @ key[j, :, 2 * h : 2 * h + 2].T).norm()
        torch.testing.assert_close(shown["pair/0"][h, i, j], expected, rtol=0, atol=1e-12)
    assert hiformer(**KINDS["shared"]).strengths()["pair/0"].shape == (2, 1, 1)


@pytest.mark.parametrize("kind", ["composite", "full_composite", "factors_per_head"])
def test_composite_strengths(kind: str) -> None:
    block = hiformer(**KINDS[kind])
    shown = block.strengths()
    assert list(shown) == ["key/0", "value/0"]
    for name, module, dim in (("key/0", layer(block).key, 2), ("value/0", layer(block).value, 5)):
        matrix = composite(cast(Composite, module))  # [L·D, L, H·d]
        for h, i, j in itertools.product(range(2), range(5), range(5)):
            expected = np.linalg.norm(matrix[6 * i : 6 * i + 6, j, h * dim : (h + 1) * dim])
            assert shown[name][h, i, j].item() == pytest.approx(float(expected), abs=1e-12)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


PAPER = FieldLayout(tuple(f"f{i}" for i in range(37)), 128)  # with the task token L = 38
TASK = 8_192 + 32_768 + 131_712 + 2 * 2 * 128 + 128  # query, O, FFN, two norms, the token itself


@pytest.mark.parametrize(
    ("options", "keys_and_values"),
    [
        (FULL, 59_146_240),
        ({}, 933_888 + 14_942_208),
        ({"attention": "hetero"}, 1_556_480),
        ({"attention": "hetero", "num_layers": 2, "norm_per_token": True}, 1_556_480 + 8_118_016 + 38 * 512),
    ],
    ids=["full", "low_rank", "hetero_1", "hetero_2"],
)
def test_sizes_of_the_paper(options: dict[str, Any], keys_and_values: int) -> None:
    with torch.device("meta"):
        block = Hiformer(Hiformer.Config(**options), PAPER)
    assert size(block) == keys_and_values + TASK


def test_sizes_by_the_formula() -> None:
    h, dk, dv, d, f, n, t, rk, rv = 2, 2, 5, 6, 7, 5, 1, 3, 4
    task = t * (d * h * dk + h * dv * d + 2 * d * f + f + d) + 4 * d + t * d
    assert size(hiformer(attention="hetero")) == n * d * h * (dk + dv) + task
    assert size(hiformer(**FULL)) == n * n * d * h * (dk + dv) + task
    assert size(hiformer()) == rk * (n * d + n * h * dk) + rv * (n * d + n * h * dv) + task
    assert size(hiformer(share_factors=False)) == h * (rk * (n * d + n * dk) + rv * (n * d + n * dv)) + task
    assert size(hiformer(**KINDS["shared"])) == d * h * (dk + dv) + task
    unpruned = n * (d * h * dk + h * dv * d + 2 * d * f + f + d) + 4 * d + t * d
    assert size(hiformer(attention="hetero", prune_last=False)) == n * d * h * (dk + dv) + unpruned
    assert size(hiformer(attention="hetero", position_bias=True)) == size(hiformer(attention="hetero")) + n * d
    assert size(hiformer(attention="hetero", ffn="none")) == size(hiformer(attention="hetero")) - (2 * d * f + f + d) - 2 * d


def test_dropout_acts_in_training_only_and_explanations_come_before_it() -> None:
    torch.manual_seed(10)
    block = hiformer(attention_dropout=0.5, dropout=0.5)
    x_BFD = randn(3, 4, 6)
    assert not torch.equal(block(x_BFD), block(x_BFD))
    shown = block.explain(x_BFD)["attention/0"]
    torch.testing.assert_close(shown.sum(-1), torch.ones(3, 2, 1, dtype=torch.float64), rtol=0, atol=1e-12)
    block.eval()
    assert torch.equal(block(x_BFD), block(x_BFD))
    without = hiformer()
    without.load_state_dict(block.state_dict())
    assert torch.equal(without.train()(x_BFD), block(x_BFD))


def test_gradients() -> None:
    torch.manual_seed(11)
    block = hiformer(num_layers=2)
    assert torch.autograd.gradcheck(block, (randn(2, 4, 6).requires_grad_(),), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: 0}, f"Hiformer.{name} is 0") for name in ("num_layers", "num_tasks", "num_heads", "key_dim", "value_dim")),
        *(({name: 0}, f"Hiformer.{name} is 0") for name in ("rank_key", "rank_value", "ffn_dim")),
        ({"dropout": 1.0}, "Hiformer.dropout is 1"),
        ({"attention_dropout": -0.1}, "Hiformer.attention_dropout is -0.1"),
        ({"composite": ()}, "Hiformer.composite is empty; name some of q, k and v"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Hiformer.Config(**options)
