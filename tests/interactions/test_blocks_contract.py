"""What holds for every interaction block, one configuration each (two where a switch changes the code path)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrlib.config import Component, from_json, to_json
from ctrlib.interactions.afm import AFM
from ctrlib.interactions.afn import LogTransform
from ctrlib.interactions.aoanet import GeneralizedInteraction
from ctrlib.interactions.arm_net import ARMNet
from ctrlib.interactions.autoint import AutoInt
from ctrlib.interactions.base import Interaction, build
from ctrlib.interactions.cin import CIN
from ctrlib.interactions.compose import Parallel, Stack
from ctrlib.interactions.cross_net import CrossNet, CrossNetMix, CrossNetV2
from ctrlib.interactions.deep_crossing import DeepCrossing
from ctrlib.interactions.destine import Destine
from ctrlib.interactions.dlrm import DotInteraction
from ctrlib.interactions.edcn import EDCN
from ctrlib.interactions.euler_net import EulerNet
from ctrlib.interactions.ffm import FFM
from ctrlib.interactions.fgcnn import FGCNN
from ctrlib.interactions.fibinet import Bilinear, FiBiNET, SENet
from ctrlib.interactions.field_weighted import FmFM, FwFM
from ctrlib.interactions.fignn import AttentionalScore, FiGNN
from ctrlib.interactions.final_mlp import FinalMLP
from ctrlib.interactions.final_net import FactorizedMLP, FinalNet
from ctrlib.interactions.fm import FM
from ctrlib.interactions.ft_transformer import FTTransformer
from ctrlib.interactions.gdcn import GatedCrossNet
from ctrlib.interactions.hiformer import Hiformer
from ctrlib.interactions.hofm import HOFM
from ctrlib.interactions.inner_product import PIN, InnerProduct, OuterProduct
from ctrlib.interactions.interhat import InterHAt
from ctrlib.interactions.linear import FirstOrder, Linear
from ctrlib.interactions.mask_net import ParallelMaskNet, SerialMaskNet
from ctrlib.interactions.mlp import MLP
from ctrlib.interactions.nfm import BiInteraction
from ctrlib.interactions.onn import ONN
from ctrlib.interactions.rank_mixer import RankMixer
from ctrlib.interactions.sam import SAM
from ctrlib.interactions.wukong import Wukong
from ctrlib.schema import FieldLayout

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 6)
TABLE: dict[str, type[Component]] = {
    block.__name__: block for block in (AutoInt, CrossNet, CrossNetV2, FM, FinalMLP, FirstOrder, Linear, MLP, Parallel, Stack)
}
TABLE |= {block.__name__: block for block in (InnerProduct, OuterProduct, PIN, FGCNN, FwFM, FmFM, FFM, HOFM, ONN)}
TABLE |= {block.__name__: block for block in (CIN, CrossNetMix, GatedCrossNet, SENet, Bilinear, FiBiNET)}
TABLE |= {block.__name__: block for block in (SerialMaskNet, ParallelMaskNet, EDCN, DeepCrossing, DotInteraction)}
TABLE |= {block.__name__: block for block in (FiGNN, AttentionalScore)}
TABLE |= {
    block.__name__: block
    for block in (AFM, ARMNet, BiInteraction, Destine, GeneralizedInteraction, InterHAt, LogTransform, SAM)
}
# No ReLU, of which all units of one row may be off: then a gradient of zero would say nothing.
SMALL = MLP.Config(hidden_units=(8, 4), activation="silu", norm="batch", dropout=0.2)
FGCNN_SIZES: dict[str, Any] = {"kernel_heights": (3, 2), "channels": (2, 3), "pool_sizes": (2, 2), "new_maps": (2, 1)}
CONFIGS: dict[str, Interaction.Config] = {
    "mlp": MLP.Config(hidden_units=(16, 8), output_dim=3, activation="gelu", norm="batch", dropout=0.2),
    "linear": Linear.Config(output_dim=2),
    "first_order": FirstOrder.Config(),
    "fm": FM.Config(),
    "cross_net": CrossNet.Config(),
    "cross_net_v2": CrossNetV2.Config(),
    "cross_net_v2_low_rank": CrossNetV2.Config(rank=2),
    "autoint": AutoInt.Config(num_layers=2, head_dim=4, attention_dropout=0.2),
    "autoint_official": AutoInt.Config(
        num_layers=2, head_dim=4, bias=True, projection_activation="relu", scale=True, norm="after_relu", norm_eps=1e-8
    ),
    "autoint_fuxictr": AutoInt.Config(num_layers=2, head_dim=4, residual="linear_if_needed", norm="before_relu"),
    "stack": Stack.Config(blocks=(AutoInt.Config(num_layers=1, head_dim=4), MLP.Config(hidden_units=(8,)))),
    "parallel_sum": Parallel.Config(streams=(FM.Config(), MLP.Config(hidden_units=(8, 1), activation="tanh"))),
    "parallel_concat": Parallel.Config(streams=(CrossNet.Config(), AutoInt.Config(head_dim=4)), fusion="concat"),
    "parallel_bilinear": Parallel.Config(streams=(AutoInt.Config(head_dim=4), SMALL), fusion="bilinear", num_heads=2),
    "final_mlp": FinalMLP.Config(mlp1=SMALL, mlp2=SMALL, fs_hidden_units=(8,), num_heads=2),
    "final_mlp_plain": FinalMLP.Config(mlp1=SMALL, mlp2=SMALL, use_fs=False, fusion="product"),
    "inner_product": InnerProduct.Config(),
    "inner_product_alone": InnerProduct.Config(linear_signal=False),
    "outer_product": OuterProduct.Config(),
    "outer_product_alone": OuterProduct.Config(linear_signal=False),
    "outer_product_matrix": OuterProduct.Config(kernel="matrix"),
    "outer_product_vector": OuterProduct.Config(kernel="vector", linear_signal=False),
    "outer_product_number": OuterProduct.Config(kernel="number"),
    "pin": PIN.Config(hidden_units=(6, 3)),
    "pin_without_norm": PIN.Config(hidden_units=(6, 3), norm="none"),
    "fgcnn": FGCNN.Config(**FGCNN_SIZES),
    "fgcnn_two_vectors": FGCNN.Config(**FGCNN_SIZES, share_embedding=False, conv_norm="none", conv_bias=True, pool_pad="start"),
    "fgcnn_mlp": FGCNN.Config(**FGCNN_SIZES, generator="mlp", use_raw=False, field_order=("city", "user", "hour", "item")),
    "fgcnn_maps": FGCNN.Config(kernel_heights=(4,), channels=(2,), pool_sizes=(3,), new_maps=(2,), recombine=False),
    "fwfm": FwFM.Config(bias=True),
    "fwfm_field": FwFM.Config(linear="field"),
    "fwfm_value": FwFM.Config(linear="value"),
    "fmfm": FmFM.Config(),
    "fmfm_vector": FmFM.Config(kernel="vector"),
    "ffm": FFM.Config(),
    "hofm": HOFM.Config(order=4),
    "onn": Stack.Config(blocks=(AutoInt.Config(num_layers=1, head_dim=4), ONN.Config())),
    "hofm_shared": HOFM.Config(share_embedding=True),
    "cin": CIN.Config(hidden_units=(5, 4)),
    "cin_with_activation": CIN.Config(hidden_units=(5, 4), bias=True, activation="tanh"),
    "cross_net_mix": CrossNetMix.Config(num_layers=2, num_experts=3, rank=2),
    "cross_net_mix_linear": CrossNetMix.Config(num_layers=2, num_experts=3, rank=2, activation="none", gate="sigmoid"),
    "gated_cross_net": GatedCrossNet.Config(num_layers=2),
    "senet": SENet.Config(reduction_ratio=2, activation="sigmoid"),
    "bilinear_all": Bilinear.Config(kind="field_all"),
    "bilinear_each": Bilinear.Config(kind="field_each"),
    "bilinear_interaction": Bilinear.Config(),
    "fibinet": FiBiNET.Config(senet=SENet.Config(activation="silu")),
    "fibinet_shared": FiBiNET.Config(senet=SENet.Config(activation="silu"), share_bilinear=True),
    "mask_net_serial": SerialMaskNet.Config(hidden_units=(16, 8), dropout=0.2),
    "mask_net_serial_plain": SerialMaskNet.Config(hidden_units=(16, 8), embedding_norm=False),
    "mask_net_parallel": ParallelMaskNet.Config(num_blocks=2, block_dim=8, dropout=0.2),
    "edcn": EDCN.Config(num_layers=2, dropout=0.2),
    "edcn_sum": EDCN.Config(num_layers=2, bridge="sum", norm="none", regulation=False),
    "edcn_concat": EDCN.Config(num_layers=2, bridge="concat", temperature=2.0),
    "edcn_attention": EDCN.Config(num_layers=2, bridge="attention"),
    "deep_crossing": DeepCrossing.Config(hidden_units=(8, 5), activation="silu"),
    "deep_crossing_norm": DeepCrossing.Config(hidden_units=(8, 5), activation="silu", norm="batch", dropout=0.2),
    "dot_interaction": DotInteraction.Config(),
    "dot_interaction_bottom": DotInteraction.Config(bottom_fields=("hour", "city"), bottom_hidden_units=(8,)),
    "fignn": FiGNN.Config(num_layers=2),
    "fignn_own_layers": FiGNN.Config(num_layers=2, share_layers=False, gru=False, residual=False),
    "attentional_score": AttentionalScore.Config(),
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
    "factorized_mlp": FactorizedMLP.Config(hidden_units=(8, 6), activation="none", norm="none"),
    "final_net": FinalNet.Config(
        block1=FactorizedMLP.Config(hidden_units=(8, 4), activation="silu", dropout=0.2),
        block2=FactorizedMLP.Config(hidden_units=(5,), combine="sum", activation="tanh", norm="layer"),
    ),
    "final_net_1b": FinalNet.Config(block1=FactorizedMLP.Config(hidden_units=(8,), activation="silu"), block2=None, gate="sum"),
    "ft_transformer": FTTransformer.Config(num_layers=2, num_heads=2, residual_dropout=0.1),
    "wukong": Wukong.Config(num_fmb=2, num_lcb=3, fm_rank=3, hidden_units=(16,), dropout=0.1),
    "wukong_all_pairs": Wukong.Config(num_fmb=2, num_lcb=2, fm_rank=None, hidden_units=(16, 8)),
    "rank_mixer": RankMixer.Config(num_tokens=5, token_dim=10, ffn_factor=2, dropout=0.1),
    "euler_net": EulerNet.Config(num_orders=(4, 3)),
    "euler_net_plain": EulerNet.Config(num_orders=(3,), norm="none"),
    "arm_net": ARMNet.Config(num_heads=2, num_neurons=3),
    "arm_net_15": ARMNet.Config(num_heads=2, num_neurons=3, alpha=1.5, scale=True, keep_fields=True, exponent_clip=5.0),
    "arm_net_softmax": ARMNet.Config(num_heads=2, num_neurons=3, alpha=1.0, use_values=False),
    "arm_net_bisection": ARMNet.Config(num_heads=1, num_neurons=3, alpha=1.7, bilinear="shared", key_dim=4),
    "arm_net_learn_alpha": ARMNet.Config(num_heads=1, num_neurons=3, alpha=1.7, learn_alpha=True, bilinear="none"),
    "arm_net_additive": ARMNet.Config(num_heads=2, num_neurons=3, gate="none", neuron="additive", norm="none"),
    "log_transform": LogTransform.Config(num_neurons=5, eps=1e-4, bias=True),
    "log_transform_plain": LogTransform.Config(num_neurons=5, eps=1e-2, norm="none"),
    "afm": AFM.Config(attention_dim=5, attention_dropout=0.2, dropout=0.2),
    "bi_interaction": BiInteraction.Config(),
    "bi_interaction_norm": BiInteraction.Config(norm="batch", dropout=0.2),
    "interhat": InterHAt.Config(num_heads=2, head_dim=4, hidden_dim=5, attention_dropout=0.2),
    "interhat_official": InterHAt.Config(num_heads=2, head_dim=4, order=2, projection_activation="relu"),
    "interhat_fuxictr": InterHAt.Config(num_heads=1, head_dim=6, order=2, output="if_needed"),
    "sam1": SAM.Config(kind="sam1", pooling="weighted"),
    "sam2a": SAM.Config(kind="sam2a", dropout=0.2),
    "sam2e": SAM.Config(kind="sam2e"),
    "sam3a": SAM.Config(kind="sam3a", num_layers=2, residual=True, pooling="mean"),
    "sam3e": SAM.Config(kind="sam3e", num_layers=2, residual=True),
    "generalized_interaction": GeneralizedInteraction.Config(num_layers=2, num_subspaces=3),
    "destine": Destine.Config(head_dim=4, attention_dropout=0.2),
    "destine_each_layer": Destine.Config(head_dim=4, residual="each_layer", scale=True, final_relu=False),
    "destine_relu": Destine.Config(num_layers=1, head_dim=4, projection_activation="relu", residual="none", final_relu=False),
}
TABLE |= {block.__name__: block for block in (Hiformer, FactorizedMLP, FinalNet, FTTransformer, Wukong, RankMixer, EulerNet)}
every_block = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def make(config: Interaction.Config) -> Interaction:
    torch.manual_seed(1)
    return build(config, LAYOUT).eval()


def rows(count: int) -> Tensor:
    return torch.randn(count, LAYOUT.num_fields, LAYOUT.dim, generator=torch.Generator().manual_seed(count))


@every_block
def test_out_describes_the_output(config: Interaction.Config) -> None:
    block = make(config)
    assert block(rows(7)).shape == (7, block.out.num_fields, block.out.dim)
    assert all(name for name in block.out.names)
    assert len(set(block.out.names)) == block.out.num_fields


@every_block
def test_every_parameter_gets_a_gradient(config: Interaction.Config) -> None:
    block = make(config)  # in eval mode, where a bias before batch norm has an effect
    for p in block.parameters():
        p.data.add_(0.1 * torch.randn_like(p))  # what starts at zero may hold back its neighbour's first gradient
    block(rows(64).requires_grad_()).square().sum().backward()  # type: ignore[no-untyped-call]
    assert [name for name, p in block.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_block
def test_rows_do_not_see_each_other(config: Interaction.Config) -> None:
    x_BFD = rows(5).requires_grad_()
    y_BFD = make(config)(x_BFD)
    # Weighted: the plain sum of what a layer norm returns is constant.
    (y_BFD[2] * torch.linspace(1, 2, y_BFD.shape[2])).sum().backward()  # type: ignore[no-untyped-call]
    assert x_BFD.grad is not None
    assert x_BFD.grad[2].any()
    assert not x_BFD.grad[[0, 1, 3, 4]].any()


@every_block
def test_batch_of_one_and_odd_batches(config: Interaction.Config) -> None:
    block, x_BFD = make(config), rows(7)
    expected = block(x_BFD)
    torch.testing.assert_close(torch.cat([block(x_BFD[i : i + 1]) for i in range(7)]), expected)
    torch.testing.assert_close(block(x_BFD[:3]), expected[:3])


@every_block
def test_state_dict_round_trip_is_exact(config: Interaction.Config) -> None:
    block = make(config)
    block.train()(rows(8))  # moves the batch norm statistics
    block.eval()
    torch.manual_seed(2)
    other = build(config, LAYOUT).eval()
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(rows(5)), block(rows(5)))


@every_block
def test_config_survives_json(config: Interaction.Config) -> None:
    assert from_json(json.loads(json.dumps(to_json(config))), Interaction.Config, TABLE) == config


@every_block
def test_export_with_any_number_of_rows(config: Interaction.Config) -> None:
    block = make(config)
    exported = torch.export.export(block, (rows(4),), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    for count in (2, 9):
        torch.testing.assert_close(exported(rows(count)), block(rows(count)))


@every_block
def test_compiles_to_one_graph(config: Interaction.Config) -> None:
    torch.compiler.reset()  # blocks share a __call__, and only so many compiled versions of one function are kept
    block = make(config)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="eager")(rows(5)), block(rows(5)))


@every_block
def test_bf16_autocast(config: Interaction.Config) -> None:
    block = make(config).train()
    x_BFD = rows(32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(x_BFD).float().sum().backward()  # type: ignore[no-untyped-call]
        y_BFD = block.eval()(x_BFD)
    assert x_BFD.grad is not None
    assert x_BFD.grad.isfinite().all()
    expected = block(x_BFD)
    assert (y_BFD.float() - expected).abs().max() <= 0.05 * expected.abs().max()
