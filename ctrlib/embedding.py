"""FeatureEmbedding: ``Batch → [B, F, D]``, one lookup for all fields of one width."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ctrlib.batch import Batch, Ragged
from ctrlib.config import Component, ConfigError, check_choice, fraction, positive
from ctrlib.dropout import dropout
from ctrlib.schema import FIRST_VALUE_ID, OOV_ID, BatchLayout, FieldLayout, SequenceColumn, SparseColumn, suggest
from ctrlib.table import EmbeddingTable

RowDtype = Literal["float32", "bfloat16"]
Gate = Callable[[Tensor], Tensor]

_UNGATED = -(2**31)  # below 0 with any id added


@dataclass(frozen=True, slots=True)
class Behaviours:
    """The behaviours of B rows, oldest first and one after another, without padding.

    ``x_NAD`` [N, A, D] has a row for each of the A attributes of each of N behaviours; row b owns
    ``x_NAD[offsets_B1[b]:offsets_B1[b + 1]]`` (``offsets_B1`` [B + 1] int32). :mod:`ctrlib.ragged` has the arithmetic.
    ``real_N`` [N] tells which are no padding: some attribute is not the zero vector, as it was before dropout.
    """

    x_NAD: Tensor  # noqa: N815 (a shape suffix)
    offsets_B1: Tensor  # noqa: N815
    real_N: Tensor  # noqa: N815


class FeatureEmbedding(Component, nn.Module):
    """Every field as one token of width D. Shape: Batch → [B, F, D].

    * sparse field: the row of its value, e_i = V_i x_i;
    * number: e = x·v with one learned vector v per field (AutoInt, arXiv:1810.11921); a missing number has a vector of its own;
    * piecewise number: e = Σ_t clamp(p − t, 0, 1)·w_t + b over the bins t, p the position among them (arXiv:2203.05556);
    * sequence: mean, sum or max of the rows of its values; an empty one is a zero vector. A model that reads the behaviours of
      a history itself (:meth:`behaviours`, :meth:`targets`) names it in ``unpooled``: then its attributes have no token.

    All vocabularies of one width share one table, in which each owns a range of rows. Padding (id 0) is a zero vector and never
    trained. Token order: sparse fields, numbers, piecewise numbers, sequences; :attr:`out` has the names.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Component.Config):
        """
        Args:
            dim: D.
            dims: width of single vocabularies, by table name; their tokens are projected to D.
            fields: embed only these fields; ``None``: all.
            frozen: vocabularies whose rows are not trained (pretrained vectors).
            init_std: rows start as N(0, init_std²).
            dropout: of token coordinates, in training.
            token_dropout: chance that an id is replaced by OOV in training, so that the OOV row learns.
            row_dtype: ``bfloat16`` halves the memory of the tables; their training rounds stochastically, and is row-wise.
        """

        dim: int = 16
        dims: Mapping[str, int] = field(default_factory=dict)
        fields: tuple[str, ...] | None = None
        frozen: tuple[str, ...] = ()
        init_std: float = 0.01
        dropout: float = 0.0
        token_dropout: float = 0.0
        row_dtype: RowDtype = "float32"

        def __post_init__(self) -> None:
            positive("embedding.dim", self.dim)
            for name, width in self.dims.items():
                positive(f"embedding.dims.{name}", width)
            if self.init_std < 0:
                raise ConfigError(f"embedding.init_std is {self.init_std}; expected 0 or more")
            check_choice("embedding.row_dtype", self.row_dtype, get_args(RowDtype))
            fraction("embedding.dropout", self.dropout)
            fraction("embedding.token_dropout", self.token_dropout)
            if self.fields is not None and len(set(self.fields)) < len(self.fields):
                raise ConfigError(f"embedding.fields names a field twice: {', '.join(self.fields)}")

    def __init__(self, config: Config, layout: BatchLayout, unpooled: Collection[str] = ()) -> None:
        super().__init__()
        self.config = config
        wanted = layout.names if config.fields is None else config.fields
        for name in wanted:
            if name not in layout.names:
                raise ConfigError(f"the embedding reads field {name!r}, which the data lacks{suggest(name, layout.names)}")
        sparse = [(i, c) for i, c in enumerate(layout.sparse) if c.name in wanted]
        sequences = [c for c in layout.sequences if c.name in wanted]
        vocabularies = {c.table: c.vocab_size for _, c in sparse} | {c.table: c.vocab_size for c in sequences}
        known = {c.table for c in layout.sparse} | {c.table for c in layout.sequences}
        for name in (*config.dims, *config.frozen):
            if name not in known:
                raise ConfigError(
                    f"embedding.dims or .frozen names vocabulary {name!r}, which the data lacks{suggest(name, known)}"
                )
        if not wanted:
            raise ConfigError("the embedding has no field to read; expected at least one in the data and in embedding.fields")
        self._attributes = {c.name: tuple(name for name in c.fields if name in wanted) for c in layout.histories}
        self._targets = {
            c.name: [(name, t) for name, t in zip(c.fields, c.targets, strict=True) if name in wanted and t is not None]
            for c in layout.histories
        }
        for name in unpooled:
            if name not in self._attributes:
                raise ConfigError(f"the model reads history {name!r}, which the data lacks{suggest(name, self._attributes)}")
        silent = {attribute for name in unpooled for attribute in self._attributes[name]}
        if silent == set(wanted):
            raise ConfigError(
                "the embedding has no token: all its fields are of histories that the model reads itself "
                f"({', '.join(unpooled)}); expected another field in the data and in embedding.fields"
            )

        # Frozen vocabularies get a table each; the others one per width.
        shared: dict[tuple[int, str], dict[str, int]] = {}
        for name, size in vocabularies.items():
            key = (config.dims.get(name, config.dim), name if name in config.frozen else "")
            shared.setdefault(key, {})[name] = size
        self.tables = nn.ModuleList(
            _Table(width, sizes, sparse, len(layout.sparse), sequences, silent, config, trained=not frozen)
            for (width, frozen), sizes in shared.items()
        )
        numbers = [(i, c) for i, c in enumerate(layout.dense) if c.name in wanted]
        scalars = [(i, c) for i, c in numbers if c.num_bins == 0]
        piecewise = [(i, c) for i, c in numbers if c.num_bins > 0]
        self.scalars = _Scalars([i for i, _ in scalars], [c.missing for _, c in scalars], config) if scalars else None
        self.piecewise = (
            _Piecewise([i for i, _ in piecewise], [c.num_bins for _, c in piecewise], [c.missing for _, c in piecewise], config)
            if piecewise
            else None
        )
        names = [name for table in self._tables for name in table.sparse_names]
        names += [c.name for _, c in (*scalars, *piecewise)]
        names += [c.name for table in self._tables for c in table.sequences if c.name not in silent]
        self.out = FieldLayout(tuple(names), config.dim)

    @property
    def _tables(self) -> list[_Table]:
        return [cast(_Table, table) for table in self.tables]

    def forward(self, batch: Batch) -> Tensor:
        tokens = [t for table in self._tables if (t := table(batch.sparse)) is not None]
        tokens += [numbers(batch.dense) for numbers in (self.scalars, self.piecewise) if numbers is not None]
        tokens += [t for table in self._tables for t in table.pool(batch.sequences)]
        x_BFD = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
        return dropout(x_BFD, self.config.dropout, self.training)

    def __call__(self, batch: Batch) -> Tensor:
        return cast(Tensor, super().__call__(batch))

    def values(self, ids_N: Tensor, field: str) -> Tensor:
        """The vector of each of some ids of a sparse or sequence field, nothing pooled. Shape: [N] → [N, D].

        Gates, projections and dropout are those of tokens.
        """
        table = next(table for table in self._tables if field in table.places)
        return dropout(table.read([ids_N], [field]).squeeze(1), self.config.dropout, self.training)

    def attributes(self, history: str) -> FieldLayout:
        """The A attributes of a history that this embedding reads, and D: axes 1 and 2 of what the next two methods return.

        Raises:
            ConfigError: the data has no such history, or no attribute of it is among ``fields``.
        """
        names = self._attributes.get(history)
        if not names:
            known = [name for name, attributes in self._attributes.items() if attributes]
            raise ConfigError(f"the embedding reads no history {history!r}{suggest(history, known)}")
        return FieldLayout(names, self.config.dim)

    def behaviours(self, batch: Batch, history: str) -> Behaviours:
        """Every behaviour of a history, one row an attribute, from the tables that tokens come from. Nothing is padded.

        Gates, projections and dropout are those of tokens. A nested attribute is pooled within each behaviour by the pooling of
        its field; the zero vector where it has no value.

        Raises:
            ConfigError: see :meth:`attributes`.
        """
        names = self.attributes(history).names
        parts: dict[str, Tensor] = {}
        for table in self._tables:
            mine = [name for name in names if name in table.places]
            flat = [name for name in mine if batch.sequences[name].inner is None]
            if flat:
                x_NAD = table.read([batch.sequences[name].values for name in flat], flat)
                parts |= zip(flat, torch.split(x_NAD, 1, dim=1), strict=True) if len(flat) < len(names) else {"": x_NAD}
            for name in mine:
                if (inner := batch.sequences[name].inner) is not None:
                    parts[name] = table.bags(batch.sequences[name].values, inner, name).unsqueeze(1)
        x_NAD = parts[""] if "" in parts else torch.cat([parts[name] for name in names], dim=1)
        real_N = (x_NAD != 0).flatten(1).any(1)  # before dropout, which may leave zeros only
        return Behaviours(dropout(x_NAD, self.config.dropout, self.training), batch.sequences[names[0]].offsets, real_N)

    def targets(self, batch: Batch, history: str) -> Tensor:
        """What the candidate has for the attributes of a history: rows of the same tables. Shape: Batch → [B, A, D].

        An attribute that no field of the candidate shares, such as the time gap, is a zero vector here: so both sides have the
        same width.

        Raises:
            ConfigError: see :meth:`attributes`.
        """
        names = self.attributes(history).names
        zero_B1D = batch.dense.new_zeros(batch.sparse.shape[0], 1, self.config.dim)  # not len(), a constant when exported
        parts = dict.fromkeys(names, zero_B1D)
        for table in self._tables:
            mine = [(name, target) for name, target in self._targets[history] if target in table.places]
            single = [(name, target) for name, target in mine if target in table.sparse_at]
            if single:
                ids = [batch.sparse[:, table.sparse_at[target]] for _, target in single]
                x_BAD = table.read(ids, [target for _, target in single])
                parts |= zip([name for name, _ in single], torch.split(x_BAD, 1, dim=1), strict=True)
            for name, target in mine:
                if target not in table.sparse_at:
                    bag = batch.sequences[target].flat
                    parts[name] = table.bags(bag.values, bag.offsets, target).unsqueeze(1)
        return dropout(torch.cat([parts[name] for name in names], dim=1), self.config.dropout, self.training)

    @property
    def vocabularies(self) -> dict[str, Tensor]:
        """The rows [vocab_size, width] of every vocabulary, by its name (the field's, or that of the field it shares with)."""
        weights = ((table, table.rows.weight.detach()) for table in self._tables)
        return {
            name: weight[first : first + table.sizes[name]]
            for table, weight in weights
            for name, first in table.first_row.items()
        }

    def attach(self, first: Mapping[str, int], gate: Gate) -> None:
        """Multiply the rows of values by gates: right after the lookup, before projection and pooling.

        A value whose gate is 0 counts as padding, so means are over the others. The gates are no part of this module: neither
        its parameters nor its ``state_dict`` change. Gates attached before are replaced.

        Args:
            first: by vocabulary; id i ≥ 1 has gate number ``first[name] + i``. Vocabularies that are not named have no gates.
            gate: numbers [...] → gates [..., 1]. Number 0 stands for padding and for values without a gate; its gate must be 1.
        """
        for table in self._tables:
            table.attach(first, gate)

    def load_pretrained(self, table: str, ids: npt.NDArray[np.int32], vectors: npt.NDArray[np.float32]) -> None:
        """Copy vectors into rows of one vocabulary.

        Args:
            table: its name (the field's, or that of the field it shares with).
            ids: [N] from :meth:`ctrlib.data.encoder.Encoder.ids`; padding and OOV among them are skipped.
            vectors: [N, width]; the width is ``dims[table]`` if given, else D.

        Raises:
            ConfigError: no such vocabulary, an id outside it, or vectors of another shape.
        """
        for owner in self._tables:
            if table in owner.first_row:
                width = owner.rows.embedding_dim
                if vectors.shape != (len(ids), width):
                    raise ConfigError(
                        f"pretrained vectors of {table!r} have shape {vectors.shape}; expected ({len(ids)}, {width}): one row "
                        f"for every id, and embedding.dims.{table} (if unset, embedding.dim) as wide as the vectors"
                    )
                size = owner.sizes[table]
                if len(ids) and not 0 <= ids.min() <= ids.max() < size:  # the next vocabulary's rows begin there
                    raise ConfigError(
                        f"ids given with the pretrained vectors of {table!r} run from {ids.min()} to {ids.max()}; expected "
                        f"0 to {size - 1}: take them from the encoder that this model was built for"
                    )
                known = ids >= FIRST_VALUE_ID
                rows = torch.from_numpy(ids[known].astype(np.int64)) + owner.first_row[table]
                with torch.no_grad():
                    owner.rows.weight[rows] = torch.from_numpy(vectors[known]).to(owner.rows.weight)
                return
        known_tables = [name for owner in self._tables for name in owner.first_row]
        raise ConfigError(f"the embedding has no vocabulary {table!r}{suggest(table, known_tables)}")

    @torch.no_grad()
    def take_over(
        self, other: FeatureEmbedding, ids: Mapping[str, tuple[str, npt.NDArray[np.int32]]], closed: Collection[str]
    ) -> None:
        """Become what ``other`` is, where vocabularies have other ids: the same tokens of the same values.

        Args:
            other: of the same fields and widths.
            ids: by vocabulary of this embedding, that of the other and [its size] the id here of every id there, 0 for rows
                that are left out. Vocabularies that are not in it are the same in both.
            closed: numbers whose token is to be a zero vector.
        """
        places = {name: (table, i) for table in other._tables for i, name in enumerate(table.names)}
        for table in self._tables:
            table.rows.weight.zero_()
            for vocabulary, size in table.sizes.items():
                before, new = ids.get(vocabulary, (vocabulary, np.arange(size)))
                source = next(t for t in other._tables if before in t.sizes)
                kept = torch.from_numpy(np.flatnonzero(new))
                rows = torch.from_numpy(new).long()[kept] + table.first_row[vocabulary]
                table.rows.weight[rows] = source.rows.weight[kept + source.first_row[before]]
            if table.projection is not None:
                for i, name in enumerate(table.names):
                    source, at = places[name]
                    assert source.projection is not None
                    table.projection[i] = source.projection[at]
        first = sum(len(table.sparse_names) for table in self._tables)
        for numbers, others in ((self.scalars, other.scalars), (self.piecewise, other.piecewise)):
            if numbers is not None and others is not None:
                numbers.load_state_dict(others.state_dict())
                names = self.out.names[first : first + len(numbers.columns)]
                numbers.close([i for i, name in enumerate(names) if name in closed])
                first += len(names)


class _Table(nn.Module):
    """The rows of some vocabularies of one width, one after another; tokens are projected if the width is not D."""

    def __init__(
        self,
        width: int,
        sizes: Mapping[str, int],
        sparse: Sequence[tuple[int, SparseColumn]],
        num_columns: int,
        sequences: Sequence[SequenceColumn],
        silent: Collection[str],
        config: FeatureEmbedding.Config,
        *,
        trained: bool,
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.first_row = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
        self.token_dropout = config.token_dropout
        # Row 0 is the padding row of all: the ids 0 of other ranges are sent there, so their own rows 0 are never read.
        self.rows = EmbeddingTable(sum(sizes.values()), width, torch.bfloat16 if config.row_dtype == "bfloat16" else None)
        if not self.rows.weight.is_meta:
            with torch.no_grad():
                self.rows.weight.normal_(0, config.init_std) if trained else self.rows.weight.zero_()
                self.rows.weight[list(self.first_row.values())] = 0
        self.rows.weight.requires_grad_(trained)
        mine = [(i, c) for i, c in sparse if c.table in sizes]
        self.sparse_names = [c.name for _, c in mine]
        self.sequences = [c for c in sequences if c.table in sizes]
        self.silent = silent
        self.names = [*self.sparse_names, *(c.name for c in self.sequences)]  # in the order of the projections
        self.tables = [*(c.table for _, c in mine), *(c.table for c in self.sequences)]
        self.places = {name: i for i, name in enumerate(self.names)}
        columns, offsets = [i for i, _ in mine], [self.first_row[c.table] for _, c in mine]
        self.sparse_at = dict(zip(self.sparse_names, columns, strict=True))
        self.all_columns = columns == list(range(num_columns))
        self.columns: Tensor
        self.offsets: Tensor
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.int64), persistent=False)
        self.register_buffer("offsets", torch.tensor(offsets, dtype=torch.int32), persistent=False)
        self.gate: Gate | None = None
        self.first_gate: dict[str, int] = {}
        self.gate_offsets: Tensor
        self.projection = None if width == config.dim else nn.Parameter(torch.empty(len(self.names), width, config.dim))
        if self.projection is not None:
            for matrix in self.projection:
                nn.init.xavier_normal_(matrix)

    def attach(self, first: Mapping[str, int], gate: Gate) -> None:
        self.gate = gate
        self.first_gate = {name: first.get(name, _UNGATED) for name in self.sizes}
        offsets = torch.tensor([self.first_gate[name] for name in self.tables[: len(self.sparse_names)]], dtype=torch.int32)
        self.register_buffer("gate_offsets", offsets.to(self.offsets.device), persistent=False)

    def forward(self, ids_BF: Tensor) -> Tensor | None:
        if not self.sparse_names:
            return None
        if not self.all_columns:
            ids_BF = ids_BF.index_select(1, self.columns)
        ids_BF = self._drop_tokens(ids_BF)
        x_BFD = cast(Tensor, self.rows(_numbers(ids_BF, self.offsets)))
        if self.gate is not None:
            x_BFD = x_BFD * self.gate(_numbers(ids_BF, self.gate_offsets).clamp(min=0))
        if self.projection is None:
            return x_BFD
        return torch.einsum("bfw,fwd->bfd", x_BFD, self.projection[: len(self.sparse_names)])

    def pool(self, sequences: Mapping[str, Ragged]) -> list[Tensor]:
        """One [B, 1, D] token per sequence that has one."""
        bags = {c.name: sequences[c.name].flat for c in self.sequences if c.name not in self.silent}
        return [self.bags(bag.values, bag.offsets, name).unsqueeze(1) for name, bag in bags.items()]

    def bags(self, ids_N: Tensor, offsets_B1: Tensor, name: str) -> Tensor:
        """[B, D]: the rows of every stretch of the ids of a sequence field, pooled as the field says."""
        i = self.places[name]
        column = self.sequences[i - len(self.sparse_names)]
        ids_N = self._drop_tokens(ids_N)
        gate_N1: Tensor | None = None
        if self.gate is not None:
            gate_N1 = self.gate(_numbers(ids_N, self.first_gate[column.table]).clamp(min=0))
            ids_N = ids_N * (gate_N1.squeeze(1) != 0)
        pooled = self.rows.pool(_numbers(ids_N, self.first_row[column.table]), offsets_B1, column.pooling, gate_N1)
        return pooled if self.projection is None else pooled @ self.projection[i]

    def read(self, ids: Sequence[Tensor], names: Sequence[str]) -> Tensor:
        """[N, A, D]: the rows of A lists of N ids, as those of these fields."""
        dropped = [self._drop_tokens(ids_N) for ids_N in ids]
        places = [self.places[name] for name in names]

        def numbers(first: Mapping[str, int]) -> Tensor:
            each = (_numbers(ids_N, first[self.tables[i]]) for ids_N, i in zip(dropped, places, strict=True))
            return torch.stack(list(each), dim=1)

        x_NAD = cast(Tensor, self.rows(numbers(self.first_row)))
        if self.gate is not None:
            x_NAD = x_NAD * self.gate(numbers(self.first_gate).clamp(min=0))
        if self.projection is None:
            return x_NAD
        return torch.einsum("naw,awd->nad", x_NAD, torch.stack([self.projection[i] for i in places]))

    def _drop_tokens(self, ids: Tensor) -> Tensor:
        if not self.training or self.token_dropout == 0:
            return ids
        dropped = (torch.rand(ids.shape, device=ids.device) < self.token_dropout) & (ids > 0)
        return torch.where(dropped, OOV_ID, ids)


def _numbers(ids: Tensor, offsets: Tensor | int) -> Tensor:
    """Numbers of rows or gates, where those of each vocabulary follow one another; padding of all of them is number 0."""
    return (ids + offsets) * (ids > 0)


class _Missing(nn.Module):
    """A learned vector for a missing number, for those of F columns that had missing values in training."""

    def __init__(self, missing: Sequence[bool], config: FeatureEmbedding.Config) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(sum(missing), config.dim) * config.init_std)
        self.at: Tensor
        self.register_buffer("at", torch.tensor([i for i, m in enumerate(missing) if m], dtype=torch.int64), persistent=False)

    def close(self, columns: Sequence[int]) -> None:
        """The vectors of these columns become zero."""
        self.vectors[torch.isin(self.at, torch.tensor(columns, dtype=torch.int64, device=self.at.device))] = 0

    def forward(self, token_BFD: Tensor, gone_BF: Tensor) -> Tensor:
        extra_BMD = gone_BF.index_select(1, self.at).unsqueeze(-1) * self.vectors
        return token_BFD.index_add(1, self.at, extra_BMD.to(token_BFD.dtype))


class _Scalars(nn.Module):
    """x·v per column; columns whose training rows had no missing value read a missing one as 0."""

    def __init__(self, columns: Sequence[int], missing: Sequence[bool], config: FeatureEmbedding.Config) -> None:
        super().__init__()
        self.columns: Tensor
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.int64), persistent=False)
        self.vectors = nn.Parameter(torch.randn(len(columns), config.dim) * config.init_std)
        self.missing = _Missing(missing, config) if any(missing) else None

    def close(self, columns: Sequence[int]) -> None:
        """The tokens of these columns become zero vectors."""
        self.vectors[list(columns)] = 0
        if self.missing is not None:
            self.missing.close(columns)

    def forward(self, dense: Tensor) -> Tensor:
        x_BF = dense.index_select(1, self.columns)
        gone_BF = torch.isnan(x_BF)
        token_BFD = torch.where(gone_BF, 0.0, x_BF).unsqueeze(-1) * self.vectors
        return token_BFD if self.missing is None else cast(Tensor, self.missing(token_BFD, gone_BF))


class _Piecewise(nn.Module):
    """Piecewise-linear encoding: bin t contributes the covered share of it, clamp(p − t, 0, 1), times w_t; plus a bias."""

    def __init__(
        self, columns: Sequence[int], bins: Sequence[int], missing: Sequence[bool], config: FeatureEmbedding.Config
    ) -> None:
        super().__init__()
        self.columns: Tensor
        self.starts: Tensor
        self.owner: Tensor
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.int64), persistent=False)
        starts = torch.cat([torch.arange(n, dtype=torch.float32) for n in bins])
        owner = torch.repeat_interleave(torch.arange(len(bins)), torch.tensor(bins), output_size=sum(bins))
        self.register_buffer("starts", starts, persistent=False)
        self.register_buffer("owner", owner, persistent=False)
        self.weight = nn.Parameter(torch.randn(len(starts), config.dim) * config.init_std)
        self.bias = nn.Parameter(torch.zeros(len(columns), config.dim))
        self.missing = _Missing(missing, config) if any(missing) else None

    def close(self, columns: Sequence[int]) -> None:
        """The tokens of these columns become zero vectors."""
        self.weight[torch.isin(self.owner, torch.tensor(columns, dtype=torch.int64, device=self.owner.device))] = 0
        self.bias[list(columns)] = 0
        if self.missing is not None:
            self.missing.close(columns)

    def forward(self, dense: Tensor) -> Tensor:
        position_BF = dense.index_select(1, self.columns)
        gone_BF = torch.isnan(position_BF)
        position_BF = torch.where(gone_BF, 0.0, position_BF)
        # NOTE[DIFF] the paper's first and last bins extrapolate; here a value outside all bins counts as the nearest edge
        covered_BT = (position_BF.index_select(1, self.owner) - self.starts).clamp(0, 1)
        terms_BTD = covered_BT.unsqueeze(-1) * self.weight
        bias_BFD = self.bias.expand(dense.shape[0], -1, -1)
        token_BFD = bias_BFD.index_add(1, self.owner, terms_BTD)
        return token_BFD if self.missing is None else cast(Tensor, self.missing(token_BFD, gone_BF))
