"""ctrlib: click-through-rate modelling in PyTorch.

The public names load what they need on first use, so ``import ctrlib`` imports neither torch nor polars.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctrlib.artifact import Artifact, load, save
    from ctrlib.batch import Batch, Output
    from ctrlib.config import ConfigError
    from ctrlib.cpu import tune_cpu
    from ctrlib.data.encoder import Encoder
    from ctrlib.data.graph import GraphOptions
    from ctrlib.data.loader import Loader, StreamLoader
    from ctrlib.data.store import Store
    from ctrlib.embedding import FeatureEmbedding
    from ctrlib.experiment import (
        DataOptions,
        RunConfig,
        calibrate_run,
        configure,
        demo,
        evaluate_run,
        export_run,
        prepare,
        run_experiment,
        train,
        verify_run,
    )
    from ctrlib.models.ctr import CTRModel, build_model
    from ctrlib.models.presets import PRESETS, preset
    from ctrlib.node_artifact import NodeArtifact, load_nodes
    from ctrlib.nodes import configure_nodes, train_nodes
    from ctrlib.ranking import Ranker
    from ctrlib.schema import CrossField, DataError, DenseField, History, Schema, SequenceField, SparseField
    from ctrlib.scoring import predict_run
    from ctrlib.search.screen import screen
    from ctrlib.search.selection import Selection, apply_to_store, compact
    from ctrlib.search.tuning import SearchConfig, tune
    from ctrlib.training import FitConfig, evaluate, fit, seed_everything

_MODULES = {
    "artifact": ("Artifact", "load", "save"),
    "batch": ("Batch", "Output"),
    "config": ("ConfigError",),
    "cpu": ("tune_cpu",),
    "data.encoder": ("Encoder",),
    "data.graph": ("GraphOptions",),
    "data.loader": ("Loader", "StreamLoader"),
    "data.store": ("Store",),
    "embedding": ("FeatureEmbedding",),
    "experiment": (
        "DataOptions",
        "RunConfig",
        "calibrate_run",
        "configure",
        "demo",
        "evaluate_run",
        "export_run",
        "prepare",
        "run_experiment",
        "train",
        "verify_run",
    ),
    "models.ctr": ("CTRModel", "build_model"),
    "models.presets": ("PRESETS", "preset"),
    "node_artifact": ("NodeArtifact", "load_nodes"),
    "nodes": ("configure_nodes", "train_nodes"),
    "ranking": ("Ranker",),
    "schema": ("CrossField", "DataError", "DenseField", "History", "Schema", "SequenceField", "SparseField"),
    "scoring": ("predict_run",),
    "search.screen": ("screen",),
    "search.selection": ("Selection", "apply_to_store", "compact"),
    "search.tuning": ("SearchConfig", "tune"),
    "training": ("FitConfig", "evaluate", "fit", "seed_everything"),
}

__all__ = [
    "PRESETS",
    "Artifact",
    "Batch",
    "CTRModel",
    "ConfigError",
    "CrossField",
    "DataError",
    "DataOptions",
    "DenseField",
    "Encoder",
    "FeatureEmbedding",
    "FitConfig",
    "GraphOptions",
    "History",
    "Loader",
    "NodeArtifact",
    "Output",
    "Ranker",
    "RunConfig",
    "Schema",
    "SearchConfig",
    "Selection",
    "SequenceField",
    "SparseField",
    "Store",
    "StreamLoader",
    "apply_to_store",
    "build_model",
    "calibrate_run",
    "compact",
    "configure",
    "configure_nodes",
    "demo",
    "evaluate",
    "evaluate_run",
    "export_run",
    "fit",
    "load",
    "load_nodes",
    "predict_run",
    "prepare",
    "preset",
    "run_experiment",
    "save",
    "screen",
    "seed_everything",
    "train",
    "train_nodes",
    "tune",
    "tune_cpu",
    "verify_run",
]


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"ctrlib.{module}"), name)
    raise AttributeError(f"module 'ctrlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
