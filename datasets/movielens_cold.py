"""MovieLens-1M for cold start: movies that are warm, few-shot or cold in the training rows.

    python datasets/movielens_cold.py [--raw DIR] --out DIR [--train-negatives 4] [--eval-negatives 99] [--sessions 5000]
                                      [--seed 0]

Reads the raw files of movielens.py. A rating of 4 or 5 stars is a click. Movies are dealt at random: 10 % are cold (no
training row has one), 10 % cold for validation, 10 % few-shot (5 training clicks at most), the others warm (80 % of their
clicks train, 10 % each for validation and test). Writes train.parquet, valid.parquet (warm movies and those that are cold for
validation), test.parquet (warm, few-shot, cold; column ``segment``) and schema.json.

A session is a click and random movies that the user never rated: in training warm or few-shot ones, else of the same segment
as the click. So a popularity of zero, that of all cold movies, ranks at random and not last. Of every segment at most
``--sessions`` random clicks are evaluated, and only those of users who have enough movies of the segment left.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING or __package__:
    from . import common, movielens, sequences
else:  # a script: Python looks in this folder, not in the project's, and ctrlib need not be installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import common
    import movielens
    import sequences
from ctrlib.data.negatives import sample_negatives
from ctrlib.schema import Schema, SequenceField, SparseField

Ints = npt.NDArray[np.int64]
CLICK_STARS = 4
FEW_CLICKS = 5
SEGMENTS = ("warm", "few", "cold", "valid_cold")
SHARES = (0.7, 0.1, 0.1, 0.1)
_SESSIONS = 4096  # written at a time


def make_schema() -> Schema:
    """Ids and profile of the user; id, year, genres and the words of the title of the movie. Sessions are GAUC groups."""
    return Schema(
        fields=(
            *(SparseField(name=name, side="context") for name in movielens.USER_COLUMNS),
            SparseField(name="movie_id"),
            SparseField(name="release_year"),
            SequenceField(name="genres"),
            SequenceField(name="title", min_count=2),
        ),
        labels=("label",),
        group="session",
        ignored={"segment": "how many training clicks the movie has: for evaluation"},
    )


def deal(clicked_M: Ints, rated_M: Ints, num_movies: int, rng: np.random.Generator) -> tuple[dict[str, Ints], Ints]:
    """Deal the movies and their clicks.

    Args:
        clicked_M: the movie of every click.
        rated_M: the movie of every rating; one without any is dealt nowhere.
        num_movies: in all.
        rng: decides.

    Returns:
        By split, places in ``clicked_M``; and the segment of every movie, a place in ``SEGMENTS`` or −1.
    """
    order = rng.permutation(np.unique(rated_M))
    segment_I = np.full(num_movies, -1)
    bounds = np.rint(np.cumsum(SHARES) * len(order)).astype(np.int64)
    segment_I[order] = np.searchsorted(bounds, np.arange(len(order)), side="right")
    of_M = segment_I[clicked_M]
    # Of every movie the clicks in random order: which share, and how many, come before a click.
    shuffled = rng.permutation(len(clicked_M))
    shuffled = shuffled[np.argsort(clicked_M[shuffled], kind="stable")]
    count_I = np.bincount(clicked_M, minlength=num_movies)
    rank_M = np.empty(len(clicked_M), np.int64)
    rank_M[shuffled] = np.arange(len(clicked_M)) - np.repeat(np.cumsum(count_I) - count_I, count_I)
    share_M = rank_M / count_I[clicked_M]
    warm, few, cold, valid_cold = (of_M == i for i in range(len(SEGMENTS)))
    splits = {
        "train": (warm & (share_M < 0.8)) | (few & (rank_M < FEW_CLICKS)),
        "valid": (warm & (share_M >= 0.8) & (share_M < 0.9)) | valid_cold,
        "test": (warm & (share_M >= 0.9)) | (few & (rank_M >= FEW_CLICKS)) | cold,
    }
    return {name: np.flatnonzero(chosen) for name, chosen in splits.items()}, segment_I


def _sessions(
    data: movielens.Ratings, clicks_S: Ints, catalogue_I: Ints, segment: str, negatives: int, seed: tuple[int, int]
) -> Iterator[Any]:
    """The rows of some clicks (places among the ratings) with movies of a catalogue that their users never rated."""
    code_of = np.full(data.movies.num_rows, -1)
    code_of[catalogue_I] = np.arange(len(catalogue_I))
    known = code_of[data.movie_row] >= 0
    drawn_SC = sample_negatives(
        data.user_row[clicks_S],
        data.user_row[known],
        code_of[data.movie_row[known]],
        len(catalogue_I),
        negatives,
        seed=seed,
    )
    movies_SC = np.concatenate([data.movie_row[clicks_S, None], catalogue_I[drawn_SC]], axis=1)
    order_SC = np.argsort(np.random.default_rng((*seed, 1)).random(movies_SC.shape), axis=1)
    movies_SC = np.take_along_axis(movies_SC, order_SC, axis=1)
    for start in range(0, len(clicks_S), _SESSIONS):
        movies, order = movies_SC[start : start + _SESSIONS], order_SC[start : start + _SESSIONS]
        click_R = np.repeat(clicks_S[start : start + _SESSIONS], movies.shape[1])
        of_user = data.users.take(pa.array(data.user_row[click_R]))
        of_movie = data.movies.take(pa.array(movies.ravel()))
        yield pa.table(
            {
                "label": pa.array((order.ravel() == 0).astype(np.int8)),
                "session": pa.array(click_R.astype(np.int32)),
                "segment": pa.array([segment] * len(click_R)),
                **{name: of_user[name] for name in movielens.USER_COLUMNS},
                **{name: of_movie[name] for name in ("movie_id", "release_year", "genres", "title")},
            }
        )


def prepare(
    raw: Path | None,
    out: Path,
    *,
    train_negatives: int = 4,
    eval_negatives: int = 99,
    sessions: int = 5000,
    seed: int = 0,
) -> tuple[common.OutputFile, ...]:
    """Write the three splits and the schema.

    Columns: ``label`` int8; ``session`` int32; ``segment`` string (``warm``, ``few``, ``cold``); those of users and movies as
    in :func:`movielens.prepare`, and ``title``, the words of the title.

    Args:
        raw: folder of the raw files; ``None``: download them to ``out/raw``.
        out: folder to write to.
        train_negatives: of each training click.
        eval_negatives: of each validation and test click.
        sessions: clicks of every segment that are evaluated at most.
        seed: of everything that is random.

    Returns:
        The files of train, validation and test, in this order.

    Raises:
        DataError: see :func:`movielens.read`.
    """
    data = movielens.read(raw, out)
    clicks_M = np.flatnonzero(data.stars >= CLICK_STARS)
    rng = np.random.default_rng((seed, 0))
    splits, segment_I = deal(data.movie_row[clicks_M], data.movie_row, data.movies.num_rows, rng)
    rated_UI = np.bincount(
        data.user_row * len(SEGMENTS) + segment_I[data.movie_row], minlength=data.users.num_rows * len(SEGMENTS)
    )
    left_US = np.bincount(segment_I[segment_I >= 0], minlength=len(SEGMENTS)) - rated_UI.reshape(-1, len(SEGMENTS))
    files = []
    for split, chosen in splits.items():
        clicks = clicks_M[chosen]
        of = segment_I[data.movie_row[clicks]]
        parts: list[Iterator[Any]] = []
        if split == "train":
            catalogue = np.flatnonzero((segment_I == 0) | (segment_I == 1))
            for at, segment in enumerate(SEGMENTS[:2]):
                parts.append(_sessions(data, clicks[of == at], catalogue, segment, train_negatives, (seed, 1 + at)))
        else:
            for at, segment in enumerate(SEGMENTS):
                if not (of == at).any():
                    continue
                able = clicks[(of == at) & (left_US[data.user_row[clicks], at] >= eval_negatives)]
                print(f"{split}: {segment}: {(of == at).sum():,} clicks, {len(able):,} of users with enough movies left")
                some = np.sort(rng.permutation(able)[:sessions])
                catalogue, name = np.flatnonzero(segment_I == at), segment.removeprefix("valid_")
                number = 3 + at + (4 if split == "test" else 0)
                parts.append(_sessions(data, some, catalogue, name, eval_negatives, (seed, number)))
        tables = (table for part in parts for table in part)
        first = next(tables)
        files.append(common.write_parquet(_chain(first, tables), first.schema, out / f"{split}.parquet"))
    make_schema().save(out / "schema.json")
    print(movielens.TERMS)
    return tuple(files)


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = sequences.argument_parser(__doc__)
    parser.add_argument("--sessions", type=int, default=5000, help="clicks of every segment to evaluate (default: 5000)")
    args = parser.parse_args(argv)
    return common.run(
        lambda: prepare(
            args.raw,
            args.out,
            train_negatives=args.train_negatives,
            eval_negatives=args.eval_negatives,
            sessions=args.sessions,
            seed=args.seed,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
