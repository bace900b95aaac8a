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
    reading="""\
* AW-MoE is above DIN and MoE, for histories of all lengths from two on (of one behaviour, not by NDCG@10 to MoE). The
  weighted experts do that: without the contrastive loss (*aw_moe_plain*) it is the same.
* To DIN the gain is larger for short histories than for all, as asked. To MoE it is smaller: it grows with the history, since
  the gate is a sum over behaviours, and MoE reads their mean.
* Users without any behaviour get the learned default gate; their figures are at DIN's level and below MoE's, whose gate
  reads the other fields.
* The contrastive loss brings nothing here: the smallest λ is within the noise of seeds of none, larger ones cost (below).
  Not tried were other shares of masked behaviours, other temperatures, and the loss on the gate's units alone.
""",
)

if __name__ == "__main__":
    script(EXPERIMENT, __doc__)
