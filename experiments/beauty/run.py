"""AW-MoE and its baselines on Amazon Beauty: ``python -m experiments.beauty.run`` (heavy: five models, five seeds).

Writes a JSON for every model and seed into ``results/``, the tables, README.md, and a plot. What is there already is not run
again, so that the command goes on where it stopped. Reads ``$CTRLIB_DATA/s3rec-beauty`` (default ``../shared/data``).
"""

from __future__ import annotations

from pathlib import Path

from experiments.sequences import Sequences, script

EXPERIMENT = Sequences(
    module="experiments.beauty.run",
    title="Amazon Beauty: users with short and long histories",
    text="""The next item of a user among random items that the user did not meet; items have several attributes. The last
interaction of every user is for test, the one before for validation ([the script](../../datasets/beauty.py)). A training
session has one negative, and one in five of the validation sessions is used, for the time that five seeds take.""",
    script="beauty.py",
    raw="s3rec-beauty",
    folder=Path(__file__).resolve().parent,
    script_options=("--train-negatives", "1"),
    valid_every=5,
    reading="""\
* AW-MoE is above DIN, MoE and the plain network by both measures and for histories of all lengths, by more than seeds
  differ. As on Amazon Grocery that is the model itself, target attention with weighted experts: without the contrastive loss
  (*aw_moe_plain*) it is the same.
* To DIN the gain is larger for short histories than for all, as asked. To MoE it is smaller: it grows with the history,
  which the gate and the attention of AW-MoE read behaviour by behaviour, and MoE as one mean.
* No history here is shorter than four: the data holds users with five actions or more. The plain network, with half as
  many parameters again, is above MoE.
* The contrastive loss brings nothing. Its λ is the one of Amazon Grocery; none was tried here.
""",
)

if __name__ == "__main__":
    script(EXPERIMENT, __doc__)
