"""A saved model as a program for other runtimes: torch, AOTInductor, ONNX. Nothing is written that does not score alike.

An export is a folder: ``program.pt2`` or ``program.onnx``, its weights beside it, and ``export.json``, which names the inputs.
The program takes encoded rows, any number of them, as :class:`~ctrlib.batch.Batch` holds them: ``sparse`` [B, F] int32,
``dense`` [B, F] float32, and of every sequence ``values``, ``offsets`` and if nested ``inner``, int32. It returns logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import Dim

from ctrlib.artifact import Artifact
from ctrlib.batch import Batch
from ctrlib.calibration import calibrate_tasks, sigmoid
from ctrlib.config import ConfigError, check_choice
from ctrlib.data.requests import RequestEncoder
from ctrlib.data.source import open_source
from ctrlib.files import WRITER, new_folder, sealed, sha256, write_json
from ctrlib.hoisting import export_model, flat_inputs
from ctrlib.hoisting.program import EXPORTING, ExportedBatch
from ctrlib.metrics import auc
from ctrlib.ragged import segment_max, segment_sum
from ctrlib.ranking import TOLERANCE, Ranker, sample_request, sequence_inputs
from ctrlib.schema import DataError, suggest
from ctrlib.table import EmbeddingTable

Format = Literal["torch", "aoti", "onnx"]
Rows = Literal["float32", "bfloat16", "int8"]
Floats = npt.NDArray[np.float64]
Run = Callable[[tuple[Tensor, ...]], npt.NDArray[np.float32]]

_FORMAT = 2  # 1 had no checksum of its own
_KEYS = {"sequences": list, "inputs": list, "labels": list, "files": dict}
_CHECKED_ROWS = (1, 7, 64)


class Program:
    """An exported model, run by its own runtime. Make one with :func:`load_export`."""

    def __init__(self, info: Mapping[str, Any], run: Run) -> None:
        self.info = info
        self._run = run

    def logits(self, batch: Batch) -> npt.NDArray[np.float32]:
        """[B] or [B, T]."""
        return self._run(flat_inputs(batch, [(name, nested) for name, nested in self.info["sequences"]]))


class SmallRows(nn.Module):
    """Rows of an embedding table in fewer bytes. Shape: ids [...] → [..., D].

    ``bfloat16``: rounded. ``int8``: w ≈ scale·q with one scale a row, symmetric: \\|w − scale·q\\| ≤ scale/2.
    """

    def __init__(self, weight: Tensor, rows: str) -> None:
        super().__init__()
        self.rows: Tensor
        self.scale: Tensor | None
        if rows == "bfloat16":
            self.register_buffer("rows", weight.to(torch.bfloat16))
            self.register_buffer("scale", None)
            return
        scale_V1 = weight.float().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale_V1)
        self.register_buffer("rows", (weight.float() / scale_V1.clamp(min=1e-30)).round().to(torch.int8))

    def forward(self, ids: Tensor) -> Tensor:
        found = nn.functional.embedding(ids, self.rows).float()
        return found if self.scale is None else found * nn.functional.embedding(ids, self.scale)

    def pool(self, ids: Tensor, offsets: Tensor, mode: str, gate_N1: Tensor | None = None) -> Tensor:
        """As :meth:`.EmbeddingTable.pool`, in operations that every runtime has."""
        rows_ND, there_N1 = self(ids), (ids > 0).unsqueeze(1)
        if gate_N1 is not None:
            rows_ND = rows_ND * gate_N1
        if mode == "max":
            highest_BD = segment_max(torch.where(there_N1, rows_ND, -torch.inf), offsets)
            return torch.where(torch.isneginf(highest_BD), 0.0, highest_BD)
        total_BD = segment_sum(rows_ND * there_N1, offsets)
        return total_BD if mode == "sum" else total_BD / segment_sum(there_N1.float(), offsets).clamp(min=1)


def export(artifact: Artifact, out: str | Path, format: str = "torch", *, rows: str = "float32") -> dict[str, Any]:
    """Write a program of the model.

    Args:
        artifact: the model.
        out: a new folder.
        format: ``torch`` (``torch.export``: the graph and safetensors, read by torch alone), ``aoti`` (compiled for this kind
            of CPU; the weights stay in safetensors, mapped) or ``onnx`` (weights as external data, mapped by ONNX Runtime).
        rows: of embedding tables: ``bfloat16`` halves them, ``int8`` with one scale per row quarters them. Scores then differ;
            the largest difference is in the report, and what it costs in AUC is told by ``ctrlib verify``.

    Returns:
        What ``export.json`` holds; ``difference`` is the largest one of a probability.

    Raises:
        ConfigError: an unknown format, what it needs is not installed, or a model of nodes.
        DataError: the program does not score as the model does; nothing is written.
    """
    check_choice("format", format, get_args(Format))
    check_choice("rows", rows, get_args(Rows))
    artifact.require_rows("export")
    layout = artifact.encoder.layout
    encoder = RequestEncoder(artifact.encoder)
    sequences = sequence_inputs(layout)
    samples = [sample_request(layout, encoder, seed, count).batch() for seed, count in enumerate(_CHECKED_ROWS)]
    expected = [_probabilities(artifact, _logits(artifact.model, batch)) for batch in samples]
    model = artifact.model.requires_grad_(False)
    with _with_rows(model, rows):
        reference = [_probabilities(artifact, _logits(model, batch)) for batch in samples]  # with the rows that it will have
        example = sample_request(layout, encoder, 0).batch()
        with new_folder(out) as part:
            info: dict[str, Any] = {
                "format": _FORMAT,
                "kind": format,
                "rows": rows,
                "sequences": [list(pair) for pair in sequences],
                "inputs": _input_names(sequences),
                "labels": list(layout.labels),
                "columns": {"sparse": [c.name for c in layout.sparse], "dense": [c.name for c in layout.dense]},
                "encoder_hash": artifact.encoder.hash,
            }
            _WRITERS[cast(Format, format)](model, example, sequences, part)
            files = (p for p in sorted(part.rglob("*")) if p.is_file() and p.name != WRITER)
            info["files"] = {str(p.relative_to(part)): sha256(p) for p in files}
            write_json(part / "export.json", sealed(info))
            program = load_export(part)
            shown = [_probabilities(artifact, program.logits(batch).astype(np.float64)) for batch in samples]
            worst = _largest_difference(shown, reference)
            if not worst <= TOLERANCE:
                raise DataError(
                    f"the {format} program scores otherwise than the model: probabilities differ by {worst:.1e}, allowed are "
                    f"{TOLERANCE:.0e}; nothing was written"
                )
            info["difference"] = _largest_difference(shown, expected)
            info = sealed(info)
            write_json(part / "export.json", info)
    return info


def _largest_difference(shown: Sequence[Floats], expected: Sequence[Floats]) -> float:
    """NaN where a number is NaN."""
    return float(np.max([np.abs(a - b).max() for a, b in zip(shown, expected, strict=True)]))


def load_export(path: str | Path) -> Program:
    """Open a folder written by :func:`export`.

    Raises:
        DataError: not an export, of another format, or a file missing or damaged.
        ConfigError: its runtime is not installed.
    """
    folder = Path(path)
    try:
        info = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        kind, found = info["kind"], info["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no export, or its export.json is damaged ({error}); export the model again") from error
    if found != _FORMAT:
        raise DataError(
            f"export {folder} has format {found}; this version reads {_FORMAT}: export the model again, or install the ctrlib "
            "that wrote it"
        )
    if info != sealed(info) or any(not isinstance(info.get(key), wanted) for key, wanted in _KEYS.items()):
        raise DataError(f"export file {folder / 'export.json'} is damaged or was changed; export the model again")
    if kind not in _READERS:
        raise DataError(f"export {folder} is of kind {kind!r}; expected {', '.join(_READERS)}{suggest(str(kind), _READERS)}")
    for name in {_FILES[cast(Format, kind)], *info["files"]}:
        if not (folder / name).is_file() or sha256(folder / name) != info["files"].get(name):
            raise DataError(f"export file {folder / name} is missing or damaged; export the model again")
    return Program(info, _READERS[cast(Format, kind)](folder))


def verify(
    artifact: Artifact, data: object, exports: Mapping[str, Program], *, rows: int | None = None
) -> dict[str, dict[str, float]]:
    """Score raw rows by every path and compare with evaluation.

    Args:
        artifact: the model.
        data: raw rows, see :func:`~ctrlib.data.source.open_source`; with labels, AUC is compared too.
        exports: programs by name.
        rows: read at most so many.

    Returns:
        By path (``ranker``, ``ranker, context in every row``, and those of ``exports``): ``difference``, the largest one of a
        probability; with one label column in the data, ``auc`` and ``auc_change``.

    Raises:
        DataError: the rows cannot be read, or there are none.
        ConfigError: the model is one of nodes.
    """
    artifact.require_rows("verify")
    table = open_source(data)
    if table.num_rows == 0 or (rows is not None and rows < 1):
        wanted = "" if rows is None or rows >= 1 else f", of which {rows} are wanted"
        raise DataError(f"{table.name} has {table.num_rows} rows{wanted}; expected at least one to compare scores of")
    if rows is not None and rows < table.num_rows:
        table = table.select(np.arange(table.num_rows) < rows)
    table.require(artifact.schema.inputs, ", which the model reads")
    expected = artifact.predict(table)
    labels = None
    if len(artifact.schema.labels) == 1 and artifact.schema.labels[0] in table.types:
        labels = np.concatenate([cast(Tensor, b.labels).numpy() for b in artifact.batches(table, labels=True)])[:, 0]
    columns = {name: table.column(name).to_pylist() for name in artifact.schema.inputs}
    shown: dict[str, Floats] = {}
    for name, hoisting in (("ranker", True), ("ranker, context in every row", False)):
        ranker = Ranker(artifact, hoisting=hoisting)
        found = []
        for at in range(len(expected)):
            context = {field: columns[field][at] for field in ranker.context_fields}
            found.append(ranker.score(context, [{field: columns[field][at] for field in ranker.candidate_fields}]))
        shown[name] = np.concatenate(found)
    for name, program in exports.items():
        parts = [program.logits(batch) for batch in artifact.batches(table, labels=False)]
        shown[name] = _probabilities(artifact, np.concatenate(parts).astype(np.float64))
    report: dict[str, dict[str, float]] = {}
    for name, probability in shown.items():
        report[name] = {"difference": float(np.abs(probability - expected).max())}
        if labels is not None:
            report[name] |= {"auc": auc(labels, probability), "auc_change": auc(labels, probability) - auc(labels, expected)}
    return report


def _logits(model: nn.Module, batch: Batch) -> Floats:
    with torch.inference_mode():
        return cast(Floats, model(batch).logits.double().numpy())


def _probabilities(artifact: Artifact, logits: Floats) -> Floats:
    return sigmoid(calibrate_tasks(artifact.calibration, logits))


@contextmanager
def _with_rows(model: nn.Module, rows: str) -> Iterator[None]:
    """The model with smaller rows, inside the block."""
    if rows == "float32":
        yield
        return
    tables = [(name, m) for name, m in model.named_modules() if isinstance(m, EmbeddingTable)]
    changed: dict[int, nn.Module] = {}
    for name, table in tables:
        if id(table) not in changed:
            changed[id(table)] = SmallRows(table.weight.detach(), rows)
        model.set_submodule(name, changed[id(table)])
    try:
        yield
    finally:
        for name, table in tables:
            model.set_submodule(name, table)


# One writer and one reader for each format.


class _Functional(nn.Module):
    """The model with its weights as inputs, so that a program holds none of them."""

    def __init__(self, model: nn.Module, sequences: Sequence[tuple[str, bool]]) -> None:
        super().__init__()
        self.program = (ExportedBatch(cast(Any, model), sequences),)  # in a tuple: no submodule, so its weights are not ours

    def forward(self, weights: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        return cast(Tensor, torch.func.functional_call(self.program[0], weights, inputs))


def _functional(
    model: nn.Module, example: Batch, sequences: Sequence[tuple[str, bool]], part: Path
) -> torch.export.ExportedProgram:
    """The program without weights; they are written beside it."""
    inner = ExportedBatch(cast(Any, model), sequences)
    weights = {name: t.detach() for name, t in sorted((*inner.named_parameters(), *inner.named_buffers()))}
    save_file({name: t.contiguous() for name, t in weights.items()}, part / _WEIGHTS)
    inputs = flat_inputs(example, sequences)
    shapes: Any = ({name: {} for name in weights}, tuple({0: Dim.DYNAMIC} for _ in inputs))
    with EXPORTING, torch.no_grad():
        return torch.export.export(_Functional(model, sequences), (weights, *inputs), dynamic_shapes=shapes)


def _input_names(sequences: Sequence[tuple[str, bool]]) -> list[str]:
    names = ["sparse", "dense"]
    for name, nested in sequences:
        names += [f"{name}.values", f"{name}.offsets", *([f"{name}.inner"] if nested else [])]
    return names


def _weights(folder: Path) -> dict[str, Tensor]:
    """Mapped from the file, not copied."""
    try:
        return dict(sorted(load_file(folder / _WEIGHTS).items()))  # in the order in which the program takes them
    except SafetensorError as error:
        raise DataError(f"export file {folder / _WEIGHTS} is damaged ({error}); export the model again") from error


def _write_torch(model: nn.Module, example: Batch, sequences: Sequence[tuple[str, bool]], part: Path) -> None:
    program = _functional(model, example, sequences, part)
    program._example_inputs = None  # they would be the weights once more
    torch.export.save(program, part / _FILES["torch"])


def _read_torch(folder: Path) -> Run:
    module = torch.export.load(folder / _FILES["torch"]).module(check_guards=False)
    # The graph alone: the module around it refuses a single row, though nothing in the graph depends on there being two.
    return _with_weights(torch.fx.GraphModule(module, module.graph), _weights(folder))


def _write_aoti(model: nn.Module, example: Batch, sequences: Sequence[tuple[str, bool]], part: Path) -> None:
    program = _functional(model, example, sequences, part)
    torch._inductor.aoti_compile_and_package(program, package_path=str(part / _FILES["aoti"]))


def _read_aoti(folder: Path) -> Run:
    return _with_weights(torch._inductor.aoti_load_package(str(folder / _FILES["aoti"])), _weights(folder))


def _with_weights(program: Callable[..., Tensor], weights: dict[str, Tensor]) -> Run:
    def run(inputs: tuple[Tensor, ...]) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            return program(weights, *inputs).numpy()

    return run


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``aten._embedding_bag`` in operations of ONNX: torch's translation gives other numbers for bags with padding."""
    assert include_last_offset
    assert per_sample_weights is None
    # In floats, exact below 2²⁴ values: ONNX Runtime refuses the translation of adding up integers.
    count, ends_B = indices.shape[0], offsets[1:].long()
    passed = weight.new_zeros(count + 1).index_add(0, ends_B, torch.ones_like(ends_B, dtype=weight.dtype))
    rows_N = passed[:count].cumsum(0).long()
    found_ND = weight.index_select(0, indices.long())
    there_N1 = torch.ones_like(indices) if padding_idx < 0 else (indices != padding_idx)
    there_N1 = there_N1.unsqueeze(1).to(weight.dtype)
    empty_BD = weight.new_zeros(1, weight.shape[1]).expand(offsets.shape[0] - 1, -1)
    if mode == 2:
        lowest = torch.finfo(weight.dtype).min
        raised_ND = torch.where(there_N1 > 0, found_ND, lowest)
        at_ND = rows_N.unsqueeze(1).expand(-1, weight.shape[1])
        highest_BD = (empty_BD + lowest).scatter_reduce(0, at_ND, raised_ND, "amax")
        result = torch.where(highest_BD == lowest, 0.0, highest_BD)
    else:
        result = (empty_BD + 0).index_add(0, rows_N, found_ND * there_N1)
        if mode == 1:
            result = result / (empty_BD[:, :1] + 0).index_add(0, rows_N, there_N1).clamp(min=1)
    nothing = offsets.new_zeros(0)
    return result, nothing, nothing, nothing


def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    """``aten.index_add`` as a scatter: torch's translation adds to other places where ``dim`` is not 0."""
    places = index.long().reshape([-1 if d == dim % x.dim() else 1 for d in range(x.dim())])
    return x.scatter_add(dim, places.expand(source.shape), source * alpha)


def _write_onnx(model: nn.Module, example: Batch, sequences: Sequence[tuple[str, bool]], part: Path) -> None:
    try:
        import onnxscript  # noqa: F401 — torch's exporter asks for it late, and less clearly
    except ImportError as error:
        raise ConfigError("the ONNX format needs more packages; pip install 'ctrlib[onnx]'") from error
    program = export_model(cast(Any, model), example, sequences)
    table = torch.export.default_decompositions()
    for bag in (torch.ops.aten._embedding_bag, torch.ops.aten._embedding_bag_forward_only):
        table[bag.default] = _embedding_bag
    table[torch.ops.aten.index_add.default] = _index_add
    with EXPORTING:
        torch.onnx.export(
            program.run_decompositions(table),
            (),
            str(part / _FILES["onnx"]),
            input_names=_input_names(sequences),
            output_names=["logits"],
            dynamo=True,
            external_data=True,
            verbose=False,
        )


def _read_onnx(folder: Path) -> Run:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError("running an ONNX program needs ONNX Runtime; pip install 'ctrlib[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(folder / _FILES["onnx"]), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes have no common one
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"ONNX Runtime cannot run {folder / _FILES['onnx']} ({reason:.300}); use the torch format") from error
    names = [entry.name for entry in session.get_inputs()]  # without those that the model does not read
    order = {name: at for at, name in enumerate(json.loads((folder / "export.json").read_text(encoding="utf-8"))["inputs"])}

    def run(inputs: tuple[Tensor, ...]) -> npt.NDArray[np.float32]:
        (logits,) = session.run(None, {name: inputs[order[name]].numpy() for name in names})
        return cast(npt.NDArray[np.float32], logits)

    return run


_WEIGHTS = "weights.safetensors"
_FILES: Mapping[Format, str] = {"torch": "program.pt2", "aoti": "program.pt2", "onnx": "program.onnx"}
_WRITERS = {"torch": _write_torch, "aoti": _write_aoti, "onnx": _write_onnx}
_READERS = {"torch": _read_torch, "aoti": _read_aoti, "onnx": _read_onnx}
