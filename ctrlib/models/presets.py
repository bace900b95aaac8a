"""Published configurations by name, in flavours (``final_mlp`` is the same in both of its own).

* ``paper``: the equations as printed; widths and depths that a paper tunes per data set are our choice.
* ``fuxictr``: the benchmark code behind the published BARS numbers: dim 10, N(0, 1e-4²) embeddings, Xavier-normal layers,
  batch-normalised MLPs. Dropout, L2 and depths that BARS tuned per data set are in ``experiments/``.
* ``official``: the authors' repository, for AutoInt, ARM-Net, AFN, InterHAt, OptInter and DIN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ctrlib.config import ConfigError, Table
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.adaptive_fusion import AdaptiveFusion
from ctrlib.interactions.afm import AFM
from ctrlib.interactions.afn import LogTransform
from ctrlib.interactions.aoanet import GeneralizedInteraction
from ctrlib.interactions.arm_net import ARMNet
from ctrlib.interactions.auto_fis import AutoFIS
from ctrlib.interactions.autoint import AutoInt
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.catgcn import CatInteraction
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
from ctrlib.interactions.ifm import IFM
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
from ctrlib.models.aw_moe import AWMoE
from ctrlib.models.behaviours import ActivationUnit, TargetAttention
from ctrlib.models.bst import BST
from ctrlib.models.catgcn import CatGCN
from ctrlib.models.contrastive import Contrasted, ContrastiveModel
from ctrlib.models.ctr import CTRModel, Head, ModelComponent
from ctrlib.models.din import DIN
from ctrlib.models.ensemble import EnsembleModel
from ctrlib.models.final_mlp import FinalMLPModel
from ctrlib.models.final_net import FinalNetModel
from ctrlib.models.hiformer import HiformerModel
from ctrlib.models.moe import Experts, MoE
from ctrlib.models.multi_vector import MultiVectorModel
from ctrlib.models.optinter import OptInter
from ctrlib.models.propagation import Propagation
from ctrlib.models.two_tower import TwoTower
from ctrlib.schema import suggest

Flavour = Literal["paper", "fuxictr", "official"]

_FUXICTR_EMBEDDING = FeatureEmbedding.Config(dim=10, init_std=1e-4)
_FUXICTR_MLP = MLP.Config(hidden_units=(400, 400, 400), norm="batch")


def _ctr(
    flavour: Flavour,
    interaction: Interaction.Config,
    *,
    head: Head.Config | None = None,
    first_order: FirstOrder.Config | None = None,
    dim: int = 16,
) -> CTRModel.Config:
    """A CTRModel with the flavour's embedding and initialisation."""
    embedding = _FUXICTR_EMBEDDING if flavour == "fuxictr" else FeatureEmbedding.Config(dim=dim)
    return CTRModel.Config(
        embedding=embedding,
        weight_init={"paper": "torch", "fuxictr": "xavier_normal", "official": "xavier_uniform"}[flavour],  # type: ignore[arg-type]
        interaction=interaction,
        head=head,
        first_order=first_order,
    )


def _mlp(flavour: Flavour, paper: MLP.Config, output_dim: int | None = None) -> MLP.Config:
    return replace(_FUXICTR_MLP if flavour == "fuxictr" else paper, output_dim=output_dim)


def lr(flavour: Flavour = "paper") -> CTRModel.Config:
    """Logistic regression: b + Σ_i w_i."""
    config = _ctr(flavour, FirstOrder.Config(bias=True))
    return replace(config, embedding=replace(config.embedding, dim=1))


def fm(flavour: Flavour = "paper") -> CTRModel.Config:
    """Factorization machine: b + Σ_i w_i + Σ_{i<j} ⟨v_i, v_j⟩."""
    return _ctr(flavour, FM.Config(), first_order=FirstOrder.Config(bias=True))


def dnn(flavour: Flavour = "paper") -> CTRModel.Config:
    """MLP on the concatenated embeddings."""
    return _ctr(flavour, _mlp(flavour, MLP.Config()), head=Head.Config())


def wide_deep(flavour: Flavour = "paper") -> CTRModel.Config:
    """First-order weights + MLP."""
    # NOTE[DIFF] the paper's wide part also reads hand-made crosses and is trained with FTRL
    deep = _mlp(flavour, MLP.Config(hidden_units=(1024, 512, 256)), output_dim=1)
    return _ctr(flavour, deep, first_order=FirstOrder.Config(bias=False), dim=32)


def deepfm(flavour: Flavour = "paper") -> CTRModel.Config:
    """FM + MLP on one embedding."""
    deep = _mlp(flavour, MLP.Config(hidden_units=(400, 400, 400), dropout=0.5), output_dim=1)
    interaction = Parallel.Config(streams=(FM.Config(), deep), fusion="sum")
    return _ctr(flavour, interaction, first_order=FirstOrder.Config(bias=False), dim=10)


def dcn(flavour: Flavour = "paper") -> CTRModel.Config:
    """Cross network v1 beside an MLP."""
    # NOTE[DIFF] the paper gives field i a width of 6·V_i^(1/4); one width here (set embedding.dims for others)
    deep = _mlp(flavour, MLP.Config(hidden_units=(1024, 1024), norm="batch"))
    cross = CrossNet.Config(num_layers=3 if flavour == "fuxictr" else 6)
    return _ctr(flavour, Parallel.Config(streams=(cross, deep), fusion="concat"), head=Head.Config())


def dcnv2(flavour: Flavour = "paper") -> CTRModel.Config:
    """Full-matrix cross network beside an MLP."""
    deep = _mlp(flavour, MLP.Config(hidden_units=(768, 768)))
    cross = CrossNetV2.Config(num_layers=4 if flavour == "fuxictr" else 2)
    return _ctr(flavour, Parallel.Config(streams=(cross, deep), fusion="concat"), head=Head.Config())


_AUTOINT: Mapping[Flavour, AutoInt.Config] = {
    "paper": AutoInt.Config(),
    "fuxictr": AutoInt.Config(residual="linear_if_needed", head_split="rows"),
    "official": AutoInt.Config(bias=True, projection_activation="relu", scale=True, norm="after_relu", norm_eps=1e-8),
}


def autoint(flavour: Flavour = "paper") -> CTRModel.Config:
    """Multi-head self-attention over the fields."""
    return _ctr(flavour, _AUTOINT[flavour], head=Head.Config())


def autoint_plus(flavour: Flavour = "paper") -> CTRModel.Config:
    """AutoInt + a two-layer MLP on the same embedding."""
    deep = _mlp(flavour, MLP.Config(hidden_units=(400, 400)), output_dim=1)
    attention = Stack.Config(blocks=(_AUTOINT[flavour], Linear.Config()))
    return _ctr(flavour, Parallel.Config(streams=(attention, deep), fusion="sum"))


def dual_mlp(flavour: Flavour = "paper") -> CTRModel.Config:
    """Two MLPs, added."""
    mlp = _mlp(flavour, MLP.Config(norm="batch"), output_dim=1)
    return _ctr(flavour, Parallel.Config(streams=(mlp, mlp), fusion="sum"), dim=10)


def final_mlp(flavour: Flavour = "paper") -> FinalMLPModel.Config:
    """Two gated MLPs with bilinear fusion."""
    # The paper's text was not to be had; both flavours follow the released code (gates without contexts, as on Avazu).
    block = FinalMLP.Config(
        mlp1=MLP.Config(hidden_units=(400, 400, 400), norm="batch"),
        mlp2=MLP.Config(hidden_units=(800,), norm="batch"),
        fs_hidden_units=(800,),
        num_heads=10,
    )
    return FinalMLPModel.Config(embedding=_FUXICTR_EMBEDDING, weight_init="xavier_normal", block=block)


_PRODUCT_MLP = MLP.Config(hidden_units=(700, 700, 700, 700, 700), norm="layer")


def ipnn(flavour: Flavour = "paper") -> CTRModel.Config:
    """Inner products of all pairs and the embeddings into an MLP."""
    # dim 20 and five layers of 700: the authors' code on Criteo. FuxiCTR's MLP, as in the published Frappe run, has no norm.
    deep = MLP.Config(hidden_units=(400, 400, 400)) if flavour == "fuxictr" else _PRODUCT_MLP
    return _ctr(flavour, Stack.Config(blocks=(InnerProduct.Config(), deep)), head=Head.Config(), dim=20)


def opnn(flavour: Flavour = "paper") -> CTRModel.Config:
    """Superposed outer products and the embeddings into an MLP."""
    return _ctr(flavour, Stack.Config(blocks=(OuterProduct.Config(), _PRODUCT_MLP)), head=Head.Config(), dim=20)


def pnn(flavour: Flavour = "paper") -> CTRModel.Config:
    """Inner products, superposed outer products and the embeddings into an MLP: the paper's "PNN*"."""
    products = (InnerProduct.Config(), OuterProduct.Config(linear_signal=False))
    both = Parallel.Config(streams=products, fusion="concat")
    return _ctr(flavour, Stack.Config(blocks=(both, _PRODUCT_MLP)), head=Head.Config(), dim=20)


def pin(flavour: Flavour = "paper") -> CTRModel.Config:
    """A small network for every pair of fields, then an MLP."""
    return _ctr(flavour, Stack.Config(blocks=(PIN.Config(), _PRODUCT_MLP)), head=Head.Config(), dim=20)


def _multi_vector(config: CTRModel.Config, vectors: int | Literal["others", "fields"]) -> MultiVectorModel.Config:
    """``config`` with several vectors for every value."""
    return MultiVectorModel.Config(
        embedding=config.embedding,
        weight_init=config.weight_init,
        interaction=config.interaction,
        head=config.head,
        first_order=config.first_order,
        vectors=vectors,
    )


_FGCNN: Mapping[Flavour, FGCNN.Config] = {
    "paper": FGCNN.Config(share_embedding=False),
    "fuxictr": FGCNN.Config(
        kernel_heights=(7, 7, 7, 7),
        channels=(14, 16, 18, 20),
        new_maps=(2, 2, 2, 2),
        share_embedding=False,
        recombine_norm="none",
        conv_bias=True,
        pool_pad="start",
    ),
}


def _fgcnn(
    flavour: Flavour,
    *classifier: Interaction.Config,
    head: Head.Config | None = None,
    first_order: FirstOrder.Config | None = None,
) -> MultiVectorModel.Config:
    """The generator, with vectors of its own, and a classifier of raw and generated fields; the paper's sizes for Criteo."""
    interaction = Stack.Config(blocks=(_FGCNN[flavour], *classifier))
    config = _multi_vector(_ctr(flavour, interaction, head=head, first_order=first_order, dim=20), vectors=2)
    return config if flavour == "fuxictr" else replace(config, weight_init="xavier_uniform")


def _fgcnn_mlp(flavour: Flavour, output_dim: int | None = None) -> MLP.Config:
    hidden_units = (4096, 2048, 1024, 512) if flavour == "fuxictr" else (4096, 2048)
    return MLP.Config(hidden_units=hidden_units, norm="batch", output_dim=output_dim)


def fgcnn_ipnn(flavour: Flavour = "paper") -> MultiVectorModel.Config:
    """Raw fields and fields generated by convolutions into IPNN: the paper's "FGCNN"."""
    return _fgcnn(flavour, InnerProduct.Config(), _fgcnn_mlp(flavour), head=Head.Config())


def fgcnn_dnn(flavour: Flavour = "paper") -> MultiVectorModel.Config:
    """Raw fields and fields generated by convolutions into an MLP."""
    return _fgcnn(flavour, _fgcnn_mlp(flavour), head=Head.Config())


def fgcnn_fm(flavour: Flavour = "paper") -> MultiVectorModel.Config:
    """Raw fields and fields generated by convolutions into FM."""
    # Generated fields have no values, so only the raw ones have first-order weights; here and in fgcnn_deepfm.
    return _fgcnn(flavour, FM.Config(), first_order=FirstOrder.Config(bias=True))


def fgcnn_deepfm(flavour: Flavour = "paper") -> MultiVectorModel.Config:
    """Raw fields and fields generated by convolutions into DeepFM."""
    deepfm = Parallel.Config(streams=(FM.Config(), _fgcnn_mlp(flavour, output_dim=1)), fusion="sum")
    return _fgcnn(flavour, deepfm, first_order=FirstOrder.Config(bias=False))


def fwfm(flavour: Flavour = "paper") -> MultiVectorModel.Config:
    """FM with a weight for every pair of fields."""
    # FuxiCTR's default is the paper's "FiLV": one vector per field instead of first-order weights. The published runs have
    # "FeLV": interaction.linear=value, vectors=2.
    if flavour == "fuxictr":
        return _multi_vector(_ctr(flavour, FwFM.Config(linear="field", bias=True)), vectors=1)
    return _multi_vector(_ctr(flavour, FwFM.Config(), first_order=FirstOrder.Config(bias=True), dim=10), vectors=1)


def fmfm(flavour: Flavour = "paper") -> CTRModel.Config:
    """FM with a matrix for every pair of fields."""
    return _ctr(flavour, FmFM.Config(), first_order=FirstOrder.Config(bias=True), dim=10)


def ffm(flavour: Flavour = "paper") -> MultiVectorModel.Config:
    """FM in which a value has a vector for every other field."""
    # NOTE[DIFF] the paper leaves out first-order weights for brevity
    config = _ctr(flavour, FFM.Config(), first_order=FirstOrder.Config(bias=True), dim=4)
    return _multi_vector(config, vectors="others")


def hofm(flavour: Flavour = "paper") -> MultiVectorModel.Config:
    """FM of third order, with vectors of their own for the second and the third."""
    return _multi_vector(_ctr(flavour, HOFM.Config(order=3), first_order=FirstOrder.Config(bias=True)), vectors=2)


def onn(flavour: Flavour = "paper") -> MultiVectorModel.Config:
    """Vectors for every operation of a value: one to copy, one per product; then an MLP."""
    deep = _mlp(flavour, MLP.Config(norm="batch"))
    config = _ctr(flavour, Stack.Config(blocks=(ONN.Config(), deep)), head=Head.Config(), dim=4)
    return _multi_vector(config, vectors="fields")


def cin(flavour: Flavour = "paper") -> CTRModel.Config:
    """First-order weights + CIN. Depth and widths are tuned per data set: in `paper` for Criteo, in `fuxictr` for Frappe."""
    # NOTE[DIFF] the paper measures CIN also without the first-order weights; BARS does not
    config = CIN.Config(hidden_units=(64, 64, 64), bias=True) if flavour == "fuxictr" else CIN.Config()
    return _ctr(flavour, config, head=Head.Config(), first_order=FirstOrder.Config(bias=False), dim=10)


def xdeepfm(flavour: Flavour = "paper") -> CTRModel.Config:
    """First-order weights + CIN + MLP. Both depths are tuned per data set: in `paper` for Criteo, in `fuxictr` for Frappe."""
    config = CIN.Config(hidden_units=(64,), bias=True) if flavour == "fuxictr" else CIN.Config()
    deep = _mlp(flavour, MLP.Config(hidden_units=(400, 400)), output_dim=1)
    crosses = Stack.Config(blocks=(config, Linear.Config()))
    interaction = Parallel.Config(streams=(crosses, deep), fusion="sum")
    return _ctr(flavour, interaction, first_order=FirstOrder.Config(bias=False), dim=10)


def cross_net_v2(flavour: Flavour = "paper") -> CTRModel.Config:
    """Full-matrix cross network alone. Its depth is tuned per data set: in `fuxictr` for Frappe."""
    cross = CrossNetV2.Config(num_layers=4 if flavour == "fuxictr" else 2)
    return _ctr(flavour, cross, head=Head.Config())


def dcn_mix(flavour: Flavour = "paper") -> CTRModel.Config:
    """Mixture of low-rank crosses beside an MLP. Sizes are tuned per data set; 4 experts of rank 32 are FuxiCTR's."""
    deep = _mlp(flavour, MLP.Config(hidden_units=(768, 768)))
    cross = CrossNetMix.Config(num_layers=3 if flavour == "fuxictr" else 2)
    return _ctr(flavour, Parallel.Config(streams=(cross, deep), fusion="concat"), head=Head.Config())


_GDCN_MLP = MLP.Config(hidden_units=(400, 400, 400), norm="batch", dropout=0.5)  # the released code's


def gdcn_stacked(flavour: Flavour = "paper") -> CTRModel.Config:
    """Gated cross network, an MLP after it. The depth is tuned per data set; three crosses are the released code's."""
    interaction = Stack.Config(blocks=(GatedCrossNet.Config(), _mlp(flavour, _GDCN_MLP)))
    return _ctr(flavour, interaction, head=Head.Config())


def gdcn_parallel(flavour: Flavour = "paper") -> CTRModel.Config:
    """Gated cross network beside an MLP. The depth is tuned per data set; three crosses are the released code's."""
    interaction = Parallel.Config(streams=(GatedCrossNet.Config(), _mlp(flavour, _GDCN_MLP)), fusion="concat")
    return _ctr(flavour, interaction, head=Head.Config())


def fibinet(flavour: Flavour = "paper") -> CTRModel.Config:
    """First-order weights + bilinear products of the fields, weighted and not, an MLP after them. Which pairs share a matrix,
    and the sizes, are tuned per data set: in `paper` for Criteo, in `fuxictr` for Frappe."""
    products = FiBiNET.Config()
    if flavour == "fuxictr":
        senet, bilinear = SENet.Config(reduction_ratio=2), Bilinear.Config(kind="field_all")
        products = FiBiNET.Config(senet=senet, bilinear=bilinear, share_bilinear=True)
    deep = _mlp(flavour, MLP.Config(hidden_units=(400, 400, 400), dropout=0.5))
    interaction = Stack.Config(blocks=(products, deep))
    return _ctr(flavour, interaction, head=Head.Config(), first_order=FirstOrder.Config(bias=False), dim=10)


def mask_net_serial(flavour: Flavour = "paper") -> CTRModel.Config:
    """Mask blocks one after another. Their number and widths are tuned per data set: in `fuxictr` for MovielensLatest."""
    blocks = SerialMaskNet.Config()
    if flavour == "fuxictr":
        blocks = SerialMaskNet.Config(reduction_ratio=4.0, embedding_norm=False)
    return _ctr(flavour, blocks, head=Head.Config(), dim=10)


def mask_net_parallel(flavour: Flavour = "paper") -> CTRModel.Config:
    """Mask blocks side by side, an MLP after them. Their number and widths are tuned per data set: in `fuxictr` for Frappe."""
    blocks = ParallelMaskNet.Config()
    if flavour == "fuxictr":
        blocks = ParallelMaskNet.Config(block_dim=50, embedding_norm=False)
    # Without batch normalisation in FuxiCTR too: the blocks are normalised by layer.
    interaction = Stack.Config(blocks=(blocks, MLP.Config(hidden_units=(400, 400, 400))))
    return _ctr(flavour, interaction, head=Head.Config(), dim=10)


def edcn(flavour: Flavour = "paper") -> CTRModel.Config:
    """Cross network and MLP that exchange what they found after every layer. Depth and temperature are tuned per data set."""
    return _ctr(flavour, EDCN.Config(), head=Head.Config())


def deep_crossing(flavour: Flavour = "paper") -> CTRModel.Config:
    """Residual units on the embeddings side by side. Their number and widths are tuned per data set."""
    units = DeepCrossing.Config(hidden_units=(64, 64, 64), norm="batch") if flavour == "fuxictr" else DeepCrossing.Config()
    return _ctr(flavour, units, head=Head.Config())


def dlrm(flavour: Flavour = "paper") -> CTRModel.Config:
    """Inner products of all pairs of fields, the top MLP after them. Sizes are tuned per data set: in `paper` for Criteo."""
    # NOTE[DIFF] no bottom MLP: which columns are numbers is not known before the data are
    top = _mlp(flavour, MLP.Config(hidden_units=(512, 256)))
    return _ctr(flavour, Stack.Config(blocks=(DotInteraction.Config(), top)), head=Head.Config())


def fignn(flavour: Flavour = "paper") -> CTRModel.Config:
    """Fields as nodes of a graph that exchange messages. The number of steps is tuned per data set."""
    if flavour == "fuxictr":
        interaction = Stack.Config(blocks=(FiGNN.Config(share_layers=False), AttentionalScore.Config()))
    else:
        attention = AutoInt.Config(num_layers=1, num_heads=2, head_dim=8, scale=True, residual="none")
        interaction = Stack.Config(blocks=(attention, FiGNN.Config(), AttentionalScore.Config()))
    return _ctr(flavour, interaction)


def hiformer(flavour: Flavour = "paper") -> HiformerModel.Config:
    """Attention of a task token over learned mixtures of all fields, of low rank and pruned: the production model."""
    # NOTE[DIFF] the hidden layers of the map of the numbers and of the tower are what the paper's parameter counts allow
    return HiformerModel.Config(embedding=FeatureEmbedding.Config(dim=128), num_dense_tokens=6)


def hetero_att(flavour: Flavour = "paper") -> HiformerModel.Config:
    """Two layers of attention with weights of their own for every field."""
    block = Hiformer.Config(attention="hetero", num_layers=2, norm_per_token=True)
    return replace(hiformer(flavour), block=block)


def transformer(flavour: Flavour = "paper") -> HiformerModel.Config:
    """Three layers of attention with weights that all fields share: Hiformer's baseline."""
    return replace(hiformer(flavour), block=Hiformer.Config(attention="shared", ffn="shared", num_layers=3))


def _final_net(flavour: Flavour, block: FinalNet.Config) -> FinalNetModel.Config:
    if flavour == "fuxictr":
        plain = FactorizedMLP.Config(hidden_units=(64, 64, 64), activation="none")
        block = FinalNet.Config(block1=plain, block2=None if block.block2 is None else plain, gate="none")
    return FinalNetModel.Config(embedding=_FUXICTR_EMBEDDING, weight_init="xavier_normal", block=block)


def final_net_1b(flavour: Flavour = "paper") -> FinalNetModel.Config:
    """One stack of factorized layers. ``paper``: widths of the authors' run on Frappe; ``fuxictr``: its model's defaults."""
    return _final_net(flavour, FinalNet.Config(block2=None, gate="none"))


def final_net_2b(flavour: Flavour = "paper") -> FinalNetModel.Config:
    """Two stacks of factorized layers that learn from their mean. Flavours: see ``final_net_1b``."""
    return _final_net(flavour, FinalNet.Config())


def ft_transformer(flavour: Flavour = "paper") -> CTRModel.Config:
    """Pre-norm Transformer over the fields: the paper's default, which it also tunes per data set."""
    config = _ctr(flavour, FTTransformer.Config(), head=Head.Config(), dim=192)
    return replace(config, embedding=replace(config.embedding, init_std=0.04))


def wukong(flavour: Flavour = "paper") -> CTRModel.Config:
    """Stacked factorization machines and an MLP: the smallest model of the paper's scaling study."""
    # NOTE[DIFF] the paper does not give the widths of the last MLP
    blocks = (Wukong.Config(), MLP.Config(hidden_units=(512, 256)))
    return _ctr(flavour, Stack.Config(blocks=blocks), head=Head.Config(), dim=128)


def rank_mixer(flavour: Flavour = "paper") -> CTRModel.Config:
    """Tokens that exchange pieces, and an FFN for each: the sizes of the paper's smaller model."""
    # NOTE[DIFF] the FFN's factor of 4 is our choice: 151 million parameters in the layers, where the paper has 107 in all
    return _ctr(flavour, RankMixer.Config(), head=Head.Config())


def euler_net(flavour: Flavour = "paper") -> CTRModel.Config:
    """Interactions of learned order in complex space. ``paper``: as released for Criteo; tuned per data set."""
    plain = EulerNet.Config(num_orders=(3,), norm="none", explicit_dropout=0.0, implicit_dropout=0.0)
    return _ctr(flavour, plain if flavour == "fuxictr" else EulerNet.Config(), head=Head.Config())


def arm_net(flavour: Flavour = "paper") -> CTRModel.Config:
    """Exponential neurons over sparsely attended fields, then an MLP.

    Heads, neurons, α and the MLP are those of the paper on Frappe, where it tunes them per data set. ``official`` is the later
    state of the authors' repository: scores divided by √d, narrower MLPs.
    """
    # NOTE[DIFF] both have Xavier-uniform tables and numbers clamped to [0.001, 1]; here the embedding and the encoder decide.
    block = ARMNet.Config(num_heads=8, num_neurons=32, alpha=2.0, scale=flavour == "official")
    interaction = Stack.Config(blocks=(block, _arm_mlp(flavour)))
    return replace(_ctr(flavour, interaction, head=Head.Config(), dim=10), weight_init="torch")


def arm_net_plus(flavour: Flavour = "paper") -> EnsembleModel.Config:
    """ARM-Net and an MLP on tables of their own, mixed; sizes as in ``arm_net``, those of the ensemble on Frappe."""
    block = ARMNet.Config(num_heads=4, num_neurons=4, alpha=1.5, scale=flavour == "official")
    return EnsembleModel.Config(
        embedding=FeatureEmbedding.Config(dim=10),
        interaction=Stack.Config(blocks=(block, _arm_mlp(flavour))),
        deep=_arm_mlp(flavour),
    )


def _arm_mlp(flavour: Flavour) -> MLP.Config:
    return MLP.Config(hidden_units=(256, 256) if flavour == "official" else (300, 300), norm="batch")


_AFN: Mapping[Flavour, LogTransform.Config] = {
    "paper": LogTransform.Config(),
    "fuxictr": LogTransform.Config(eps=1e-5),
    "official": LogTransform.Config(eps=1e-4, bias=True),
}


def afn(flavour: Flavour = "paper") -> CTRModel.Config:
    """Products of fields to learned powers, then an MLP.

    The 600 neurons are those of the authors' code for Frappe; the paper tunes them per data set.
    """
    # NOTE[DIFF] in the authors' code the batch norm of the MLP stands after the ReLU
    mlp = _mlp(flavour, MLP.Config(hidden_units=(400, 400, 400), norm="batch"))
    return _ctr(flavour, Stack.Config(blocks=(_AFN[flavour], mlp)), head=Head.Config(), dim=10)


def afn_plus(flavour: Flavour = "paper") -> EnsembleModel.Config:
    """AFN and an MLP on tables of their own, mixed; sizes as in ``afn``."""
    # NOTE[DIFF] the authors train each tower by a loss of its own; here, as in FuxiCTR, the mixture's loss trains all
    single = afn(flavour)
    deep = _mlp(flavour, MLP.Config(hidden_units=(400, 400, 400), norm="batch"))
    return EnsembleModel.Config(
        embedding=single.embedding, weight_init=single.weight_init, interaction=single.interaction, deep=deep
    )


def catgcn_interaction(flavour: Flavour = "paper") -> CTRModel.Config:
    """CatGCN's local and global interaction of the fields, each projected to a logit."""
    # NOTE[DIFF] the released code starts embeddings as N(0, 1), for a learning rate of .1; here as every other model
    return _ctr(flavour, CatInteraction.Config(output_dim=1, local_hidden_units=(64,), global_hidden_units=(64,)), dim=64)


def afm(flavour: Flavour = "paper") -> CTRModel.Config:
    """FM whose pairs are weighed by attention; widths and dropout, which the paper tunes per data set, are our choice."""
    block = AFM.Config(attention_dim=10) if flavour == "fuxictr" else AFM.Config(attention_dim=16, dropout=0.2)
    interaction = Stack.Config(blocks=(block, Linear.Config(bias=False)))
    return _ctr(flavour, interaction, first_order=FirstOrder.Config(bias=True))


def nfm(flavour: Flavour = "paper") -> CTRModel.Config:
    """An MLP on the sum of all pairs of fields; sizes and dropout, which the paper tunes per data set, are our choice."""
    block = BiInteraction.Config() if flavour == "fuxictr" else BiInteraction.Config(norm="batch", dropout=0.5)
    deep = _mlp(flavour, MLP.Config(hidden_units=(64,), norm="batch", dropout=0.5), output_dim=1)
    return _ctr(flavour, Stack.Config(blocks=(block, deep)), first_order=FirstOrder.Config(bias=False), dim=64)


_INTERHAT: Mapping[Flavour, InterHAt.Config] = {
    "paper": InterHAt.Config(),
    "fuxictr": InterHAt.Config(num_heads=1, head_dim=10, order=2, output="if_needed"),
    "official": InterHAt.Config(projection_activation="relu", hidden_dim=8),
}


def interhat(flavour: Flavour = "paper") -> CTRModel.Config:
    """A transformer layer, then attention over the fields order by order; heads and widths are our choice."""
    # NOTE[DIFF] the authors' one hidden layer has no biases
    mlp = _mlp(flavour, MLP.Config(hidden_units=(8,)))
    return _ctr(flavour, Stack.Config(blocks=(_INTERHAT[flavour], mlp)), head=Head.Config())


def sam(flavour: Flavour = "paper") -> CTRModel.Config:
    """Attention between fields without softmax; which of its five kinds and how many layers is our choice in ``paper``."""
    block = SAM.Config(kind="sam2e") if flavour == "fuxictr" else SAM.Config(kind="sam3a", residual=True)
    return _ctr(flavour, block, head=Head.Config())


def aoanet(flavour: Flavour = "paper") -> CTRModel.Config:
    """Generalized interaction network beside an MLP."""
    deep = _mlp(flavour, MLP.Config(hidden_units=(400, 400, 400)))
    interaction = Parallel.Config(streams=(GeneralizedInteraction.Config(), deep), fusion="concat")
    return _ctr(flavour, interaction, head=Head.Config())


_DESTINE: Mapping[Flavour, Destine.Config] = {
    "paper": Destine.Config(),
    "fuxictr": Destine.Config(head_dim=8, residual="each_layer", final_relu=False, attention_dropout=0.1),
}


def destine(flavour: Flavour = "paper") -> CTRModel.Config:
    """Self-attention of pairs and of single fields, with first-order weights; sizes in ``paper`` are our choice."""
    interaction = Stack.Config(blocks=(_DESTINE[flavour], Linear.Config()))
    return _ctr(flavour, interaction, first_order=FirstOrder.Config(bias=False))


def destine_plus(flavour: Flavour = "paper") -> CTRModel.Config:
    """DESTINE + an MLP on the same embedding, two layers of 400 as in the authors' code."""
    deep = _mlp(flavour, MLP.Config(hidden_units=(400, 400), norm="batch"), output_dim=1)
    attention = Stack.Config(blocks=(_DESTINE[flavour], Linear.Config()))
    interaction = Parallel.Config(streams=(attention, deep), fusion="sum")
    return _ctr(flavour, interaction, first_order=FirstOrder.Config(bias=False))


def ifm(flavour: Flavour = "paper") -> CTRModel.Config:
    """FM whose weights and vectors are scaled by factors that depend on the row; sizes are our choice."""
    return _ctr(flavour, IFM.Config(), dim=1 + 16)


def optinter(flavour: Flavour = "paper") -> OptInter.Config:
    """A mixture of memorised, factorised and naive pairs, to be searched; the paper's sizes for Criteo.

    Crosses must be fields of the data to be memorised; without any, the mixture is of factorised and naive.
    """
    # NOTE[DIFF] the authors' search leaves tables at torch's N(0, 1), their re-training draws U(±(3/(F·D))²): 1e-5 on Criteo
    embedding = FeatureEmbedding.Config(dim=20, init_std=1.0) if flavour == "official" else FeatureEmbedding.Config(dim=20)
    return OptInter.Config(embedding=embedding, weight_init="xavier_uniform")


def optinter_m(flavour: Flavour = "paper") -> OptInter.Config:
    """OptInter with every pair memorised; the data must have the cross of every pair of its categorical fields."""
    return replace(optinter(flavour), choices="memorize")


def optinter_f(flavour: Flavour = "paper") -> OptInter.Config:
    """OptInter with every pair factorised."""
    return replace(optinter(flavour), choices="factorize")


def auto_fm(flavour: Flavour = "paper") -> CTRModel.Config:
    """FM with a weight for every pair of fields, which a search closes; dim as in the authors' code for Avazu."""
    return _ctr(flavour, AutoFIS.Config(), first_order=FirstOrder.Config(bias=True), dim=40)


def auto_deepfm(flavour: Flavour = "paper") -> CTRModel.Config:
    """``auto_fm`` beside an MLP; sizes as in the authors' code for Avazu."""
    deep = MLP.Config(hidden_units=(700, 700, 700, 700, 700), norm="batch", output_dim=1)
    interaction = Parallel.Config(streams=(AutoFIS.Config(), deep), fusion="sum")
    return _ctr(flavour, interaction, first_order=FirstOrder.Config(bias=False), dim=40)


def din(flavour: Flavour = "paper") -> DIN.Config:
    """Behaviours weighed by the candidate; layers of 80 and 40 in the unit, as released. ``paper``: Dice, weights without norm,
    200 and 80 after them, our choice. ``official``: sigmoids, softmax of scores divided by √d, 80 and 40 after it."""
    if flavour == "paper":
        return DIN.Config()
    # NOTE[DIFF] as released, the pooled history goes through a norm and a linear layer, the MLP's input through a norm, and the
    # candidate has a first-order weight
    unit = ActivationUnit.Config(activation="sigmoid")
    attention = TargetAttention.Config(unit=unit, norm="softmax", scale=True)
    interaction = MLP.Config(hidden_units=(80, 40), activation="sigmoid")
    return DIN.Config(
        embedding=FeatureEmbedding.Config(dim=64), weight_init="xavier_uniform", attention=attention, interaction=interaction
    )


def bst(flavour: Flavour = "paper") -> BST.Config:
    """One Transformer layer over the last 20 behaviours and the candidate."""
    return BST.Config()


def moe(flavour: Flavour = "paper") -> MoE.Config:
    """Experts of one score each and a softmax gate on all fields: a baseline, whose sizes are our choice."""
    # NOTE[DIFF] the paper's gate is noisy, keeps the k largest and is kept busy by a loss: its experts are thousands, ours few
    return MoE.Config()


def mmoe(flavour: Flavour = "paper") -> MoE.Config:
    """Experts, and a softmax gate and a tower for every label; sizes are our choice."""
    experts = Experts.Config(count=8, expert=MLP.Config(hidden_units=(128, 64)))
    return MoE.Config(experts=experts, gates="per_label", tower=MLP.Config(hidden_units=(32,)))


def aw_moe(flavour: Flavour = "paper") -> AWMoE.Config:
    """Experts weighed by the behaviours of the user, with the contrastive loss. All sizes are our choice."""
    return AWMoE.Config()


@dataclass(frozen=True)
class Preset:
    """A published model by name: how to configure it, what it is, where it comes from, and whether it must have a history."""

    make: Callable[[Flavour], ModelComponent.Config]
    description: str
    paper: str
    flavours: tuple[Flavour, ...] = ("paper", "fuxictr")
    needs_history: bool = False


PRESETS: Mapping[str, Preset] = {
    "lr": Preset(lr, "logistic regression on one-hot features", "Richardson et al. 2007, doi:10.1145/1242572.1242643"),
    "fm": Preset(fm, "factorization machine", "Rendle 2010, doi:10.1109/ICDM.2010.127"),
    "dnn": Preset(dnn, "MLP on the concatenated embeddings", "Covington et al. 2016, doi:10.1145/2959100.2959190"),
    "wide_deep": Preset(wide_deep, "first-order weights beside an MLP", "arXiv:1606.07792"),
    "deepfm": Preset(deepfm, "FM beside an MLP, one embedding", "arXiv:1703.04247"),
    "dcn": Preset(dcn, "cross network beside an MLP", "arXiv:1708.05123"),
    "dcnv2": Preset(dcnv2, "full-matrix cross network beside an MLP", "arXiv:2008.13535"),
    "autoint": Preset(autoint, "multi-head self-attention over fields", "arXiv:1810.11921", ("paper", "fuxictr", "official")),
    "autoint_plus": Preset(autoint_plus, "AutoInt beside an MLP", "arXiv:1810.11921", ("paper", "fuxictr", "official")),
    "dual_mlp": Preset(dual_mlp, "two MLPs, added", "arXiv:2304.00902"),
    "final_mlp": Preset(final_mlp, "two gated MLPs with multi-head bilinear fusion", "arXiv:2304.00902"),
    "ipnn": Preset(ipnn, "inner products of all pairs into an MLP", "arXiv:1611.00144"),
    "opnn": Preset(opnn, "superposed outer products into an MLP", "arXiv:1611.00144", ("paper",)),
    "pnn": Preset(pnn, "inner and superposed outer products into an MLP", "arXiv:1611.00144", ("paper",)),
    "pin": Preset(pin, "a small network for every pair, then an MLP", "arXiv:1807.00311", ("paper",)),
    "fgcnn_ipnn": Preset(fgcnn_ipnn, "fields generated by convolutions, into IPNN", "arXiv:1904.04447"),
    "fgcnn_dnn": Preset(fgcnn_dnn, "fields generated by convolutions, into an MLP", "arXiv:1904.04447", ("paper",)),
    "fgcnn_fm": Preset(fgcnn_fm, "fields generated by convolutions, into FM", "arXiv:1904.04447", ("paper",)),
    "fgcnn_deepfm": Preset(fgcnn_deepfm, "fields generated by convolutions, into DeepFM", "arXiv:1904.04447", ("paper",)),
    "fwfm": Preset(fwfm, "FM with a weight per pair of fields", "arXiv:1806.03514"),
    "fmfm": Preset(fmfm, "FM with a matrix per pair of fields", "arXiv:2102.12994"),
    "ffm": Preset(ffm, "FM with a vector per value and other field", "Juan et al. 2016, doi:10.1145/2959100.2959134"),
    "hofm": Preset(hofm, "FM of third order", "arXiv:1607.07195"),
    "onn": Preset(onn, "a vector per value and operation, into an MLP", "arXiv:1904.12579"),
    "cin": Preset(cin, "compressed interaction network", "arXiv:1803.05170"),
    "xdeepfm": Preset(xdeepfm, "compressed interaction network beside an MLP", "arXiv:1803.05170"),
    "cross_net_v2": Preset(cross_net_v2, "full-matrix cross network alone", "arXiv:2008.13535"),
    "dcn_mix": Preset(dcn_mix, "mixture of low-rank cross networks beside an MLP", "arXiv:2008.13535"),
    "gdcn_stacked": Preset(gdcn_stacked, "gated cross network, an MLP after it", "arXiv:2311.04635"),
    "gdcn_parallel": Preset(gdcn_parallel, "gated cross network beside an MLP", "arXiv:2311.04635"),
    "fibinet": Preset(fibinet, "weighted fields and bilinear products, an MLP after them", "arXiv:1905.09433"),
    "mask_net_serial": Preset(mask_net_serial, "mask blocks one after another", "arXiv:2102.07619"),
    "mask_net_parallel": Preset(mask_net_parallel, "mask blocks side by side, an MLP after them", "arXiv:2102.07619"),
    "edcn": Preset(edcn, "cross network and MLP that exchange after every layer", "doi:10.1145/3459637.3481915"),
    "deep_crossing": Preset(deep_crossing, "residual units on the embeddings", "doi:10.1145/2939672.2939704"),
    "dlrm": Preset(dlrm, "inner products of all pairs of fields, an MLP after them", "arXiv:1906.00091"),
    "fignn": Preset(fignn, "fields as nodes of a graph that exchange messages", "arXiv:1910.05552"),
    "hiformer": Preset(hiformer, "attention over mixtures of all fields, low rank", "arXiv:2311.05884", ("paper",)),
    "hetero_att": Preset(hetero_att, "attention with weights of their own per field", "arXiv:2311.05884", ("paper",)),
    "transformer": Preset(transformer, "attention with shared weights, task token", "arXiv:2311.05884", ("paper",)),
    "final_net_1b": Preset(final_net_1b, "layers that multiply halves of their output", "doi:10.1145/3539618.3591988"),
    "final_net_2b": Preset(final_net_2b, "two FinalNet branches that learn from each other", "doi:10.1145/3539618.3591988"),
    "ft_transformer": Preset(ft_transformer, "pre-norm Transformer over fields, CLS token", "arXiv:2106.11959", ("paper",)),
    "wukong": Preset(wukong, "stacked factorization machines", "arXiv:2403.02545", ("paper",)),
    "rank_mixer": Preset(rank_mixer, "token mixing and an FFN per token", "arXiv:2507.15551", ("paper",)),
    "euler_net": Preset(euler_net, "interactions of learned order in complex space", "arXiv:2304.10711"),
    "arm_net": Preset(arm_net, "exponential neurons over sparsely attended fields", "arXiv:2107.01830", ("paper", "official")),
    "arm_net_plus": Preset(arm_net_plus, "ARM-Net and an MLP, mixed", "arXiv:2107.01830", ("paper", "official")),
    "afn": Preset(afn, "products of fields to learned powers", "arXiv:1909.03276", ("paper", "fuxictr", "official")),
    "afn_plus": Preset(afn_plus, "AFN and an MLP, mixed", "arXiv:1909.03276", ("paper", "fuxictr", "official")),
    "afm": Preset(afm, "FM with attention over the pairs", "arXiv:1708.04617"),
    "nfm": Preset(nfm, "MLP on the sum of all pairs of fields", "arXiv:1708.05027"),
    "interhat": Preset(
        interhat, "attention over fields, order by order", "doi:10.1145/3336191.3371785", ("paper", "fuxictr", "official")
    ),
    "sam": Preset(sam, "attention between fields without softmax", "arXiv:2105.05563"),
    "aoanet": Preset(aoanet, "generalized interaction network beside an MLP", "doi:10.1145/3447548.3467133"),
    "destine": Preset(destine, "self-attention of pairs and of single fields", "arXiv:2101.03654"),
    "destine_plus": Preset(destine_plus, "DESTINE beside an MLP", "arXiv:2101.03654"),
    "ifm": Preset(ifm, "FM with a factor per field that depends on the row", "doi:10.24963/ijcai.2019/203", ("paper",)),
    "optinter": Preset(
        optinter, "pairs memorised, factorised or naive: the mixture to search", "arXiv:2108.01265", ("paper", "official")
    ),
    "optinter_m": Preset(optinter_m, "every pair memorised; needs crosses in the data", "arXiv:2108.01265", ("paper",)),
    "optinter_f": Preset(optinter_f, "every pair factorised, into an MLP", "arXiv:2108.01265", ("paper",)),
    "auto_fm": Preset(auto_fm, "FM with a gate per pair of fields", "arXiv:2003.11235", ("paper",)),
    "auto_deepfm": Preset(auto_deepfm, "FM with a gate per pair, beside an MLP", "arXiv:2003.11235", ("paper",)),
    "catgcn_interaction": Preset(
        catgcn_interaction, "all pairs of fields, and a graph over all fields", "arXiv:2009.05303", ("paper",)
    ),
    "din": Preset(din, "behaviours weighed by the candidate", "arXiv:1706.06978", ("paper", "official"), needs_history=True),
    "bst": Preset(bst, "Transformer over behaviours and candidate", "arXiv:1905.06874", ("paper",), needs_history=True),
    "moe": Preset(moe, "mixture of experts with one gate", "arXiv:1701.06538", ("paper",)),
    "mmoe": Preset(mmoe, "mixture of experts with a gate and a tower per label", "doi:10.1145/3219819.3220007", ("paper",)),
    "aw_moe": Preset(
        aw_moe,
        "experts weighed by behaviours, contrastive loss on the gate",
        "arXiv:2306.05011",
        ("paper",),
        needs_history=True,
    ),
}

COMPONENTS: Table = {
    c.__name__: c
    for c in (
        FeatureEmbedding,
        MLP,
        Linear,
        FirstOrder,
        FM,
        CrossNet,
        CrossNetV2,
        AutoInt,
        FinalMLP,
        CIN,
        CrossNetMix,
        GatedCrossNet,
        SENet,
        Bilinear,
        FiBiNET,
        SerialMaskNet,
        ParallelMaskNet,
        EDCN,
        DeepCrossing,
        DotInteraction,
        FiGNN,
        AttentionalScore,
        Stack,
        Parallel,
        Head,
        CTRModel,
        FinalMLPModel,
        InnerProduct,
        OuterProduct,
        PIN,
        FGCNN,
        MultiVectorModel,
        FwFM,
        FmFM,
        FFM,
        HOFM,
        ONN,
        Hiformer,
        HiformerModel,
        FactorizedMLP,
        FinalNet,
        FinalNetModel,
        FTTransformer,
        Wukong,
        RankMixer,
        EulerNet,
        ARMNet,
        EnsembleModel,
        LogTransform,
        AFM,
        BiInteraction,
        InterHAt,
        SAM,
        GeneralizedInteraction,
        Destine,
        IFM,
        OptInter,
        AutoFIS,
        AdaptiveFusion,
        ContrastiveModel,
        Contrasted,
        TwoTower,
        ActivationUnit,
        TargetAttention,
        Experts,
        DIN,
        BST,
        MoE,
        AWMoE,
        CatInteraction,
        CatGCN,
        Propagation,
    )
}


def preset(name: str, flavour: str = "paper") -> ModelComponent.Config:
    """The config of a published model.

    Raises:
        ConfigError: no such model or flavour; names the nearest.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no model {name!r}{suggest(name, PRESETS)} (all: {', '.join(PRESETS)})")
    chosen = PRESETS[name]
    for known in chosen.flavours:
        if known == flavour:
            return chosen.make(known)
    raise ConfigError(f"model {name!r} has no flavour {flavour!r}; expected one of {', '.join(chosen.flavours)}")
