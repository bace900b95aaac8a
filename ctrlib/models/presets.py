"""Published configurations by name, in flavours (``final_mlp`` is the same in both of its own).

* ``paper``: the equations as printed; widths and depths that a paper tunes per data set are our choice.
* ``fuxictr``: the benchmark code behind the published BARS numbers: dim 10, N(0, 1e-4²) embeddings, Xavier-normal layers,
  batch-normalised MLPs. Dropout, L2 and depths that BARS tuned per data set are in ``experiments/``.
* ``official``: the authors' repository, for AutoInt, ARM-Net, AFN and InterHAt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ctrlib.config import ConfigError, Table
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.afm import AFM
from ctrlib.interactions.afn import LogTransform
from ctrlib.interactions.aoanet import GeneralizedInteraction
from ctrlib.interactions.arm_net import ARMNet
from ctrlib.interactions.autoint import AutoInt
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.compose import Parallel, Stack
from ctrlib.interactions.cross_net import CrossNet, CrossNetV2
from ctrlib.interactions.destine import Destine
from ctrlib.interactions.final_mlp import FinalMLP
from ctrlib.interactions.fm import FM
from ctrlib.interactions.interhat import InterHAt
from ctrlib.interactions.linear import FirstOrder, Linear
from ctrlib.interactions.mlp import MLP
from ctrlib.interactions.nfm import BiInteraction
from ctrlib.interactions.sam import SAM
from ctrlib.models.ctr import CTRModel, Head, ModelComponent
from ctrlib.models.ensemble import EnsembleModel
from ctrlib.models.final_mlp import FinalMLPModel
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


def afm(flavour: Flavour = "paper") -> CTRModel.Config:
    """FM whose pairs are weighed by attention; widths and dropout, which the paper tunes per data set, are our choice."""
    block = AFM.Config(attention_dim=10) if flavour == "fuxictr" else AFM.Config(attention_dim=16, dropout=0.2)
    interaction = Stack.Config(blocks=(block, Linear.Config(bias=False)))
    return _ctr(flavour, interaction, first_order=FirstOrder.Config(bias=True))


def nfm(flavour: Flavour = "paper") -> CTRModel.Config:
    """An MLP on the sum of all pairs of fields; sizes and dropout, which the paper tunes per data set, are our choice."""
    block = BiInteraction.Config() if flavour == "fuxictr" else BiInteraction.Config(norm=True, dropout=0.5)
    deep = _mlp(flavour, MLP.Config(hidden_units=(64,), norm="batch", dropout=0.5), output_dim=1)
    return _ctr(flavour, Stack.Config(blocks=(block, deep)), first_order=FirstOrder.Config(bias=False), dim=64)


_INTERHAT: Mapping[Flavour, InterHAt.Config] = {
    "paper": InterHAt.Config(),
    "fuxictr": InterHAt.Config(num_heads=1, head_dim=10, order=2, output="if_needed"),
    "official": InterHAt.Config(projections="relu", hidden_dim=8),
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


@dataclass(frozen=True)
class Preset:
    """A published model by name: how to configure it, what it is, where it comes from."""

    make: Callable[[Flavour], ModelComponent.Config]
    description: str
    paper: str
    flavours: tuple[Flavour, ...] = ("paper", "fuxictr")


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
        Stack,
        Parallel,
        Head,
        CTRModel,
        FinalMLPModel,
        ARMNet,
        EnsembleModel,
        LogTransform,
        AFM,
        BiInteraction,
        InterHAt,
        SAM,
        GeneralizedInteraction,
        Destine,
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
