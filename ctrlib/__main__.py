"""The ``ctrlib`` command: sets how OpenMP threads wait, which must happen before torch is imported, then runs the CLI."""

from __future__ import annotations

import os


def main() -> None:
    """Entry point of the ``ctrlib`` script and of ``python -m ctrlib``."""
    # With another busy process, torch's default spinning makes steps several times slower; the cost of this on a quiet
    # machine is 0-5 %. A user's own setting wins.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")

    from ctrlib.cli import main as run  # imports torch

    run()


if __name__ == "__main__":
    main()
