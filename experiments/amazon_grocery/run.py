"""AW-MoE and its baselines on Amazon Grocery: ``python -m experiments.amazon_grocery.run`` (heavy: five models, five seeds).

Writes a JSON for every model and seed into ``results/``, the tables, README.md, and a plot. What is there already is not run
again, so that the command goes on where it stopped. Reads ``$CTRLIB_DATA/amazon-grocery`` (default ``../shared/data``).
"""

from __future__ import annotations

from pathlib import Path

from experiments.sequences import Sequences, script

EXPERIMENT = Sequences(
    module="experiments.amazon_grocery.run",
    title="Amazon Grocery: users with short and long histories",
    text="""The next item of a user among random items that the user did not meet; items have a category. The last
interaction of every user is for test, the one before for validation ([the script](../../datasets/amazon_grocery.py)).""",
    script="amazon_grocery.py",
    raw="amazon-grocery",
    folder=Path(__file__).resolve().parent,
)

if __name__ == "__main__":
    script(EXPERIMENT, __doc__)
