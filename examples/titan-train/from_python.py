# From packages/titan-train/README.md; written by tools/examples.py.

from titan_train import load
from titan_train.run import run

settings = load("debug", [("training.steps", "3"), ("run.folder", "runs/from-python")])
assert run(settings) == 0
