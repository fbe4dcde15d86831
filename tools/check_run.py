"""Check debug runs: `python tools/check_run.py runs/debug [more folders]`.

The first run must have learned what it should. The others, on other layouts, must follow its losses step by step.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

VOCABULARY = 264
BOUND = 2.3  # nats per byte
TOLERANCE = 0.02  # rounding alone moves the loss of step 40 by 4e-3 at this learning rate


def losses(folder: Path) -> dict[int, float]:
    """Return a run's reported losses by step; empty where it has reported none."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    return {m["step"]: m["loss"] for m in map(json.loads, path.read_text("utf-8").splitlines())}


def problems(folder: Path) -> list[str]:
    """Return what is wrong with a run, one sentence each."""
    wanted = ("metrics.jsonl", "config.toml", "tensorboard", "checkpoints")
    found = [f"{folder / name}: missing" for name in wanted if not (folder / name).exists()]
    curve = losses(folder)
    if not curve:
        return found
    if not abs(curve[1] - math.log(VOCABULARY)) <= 0.2:
        found.append(f"{folder}: the first loss is {curve[1]:.3f}, expected about ln({VOCABULARY})")
    last = sorted(curve)[-5:]
    final = sum(curve[step] for step in last) / len(last)
    print(f"{folder}: loss {curve[1]:.3f} at step 1, {final:.3f} on average over steps {last}")
    if not final < BOUND:
        found.append(f"{folder}: the final loss is {final:.3f}, expected less than {BOUND}")
    return found


def deviations(folder: Path, reference: Path) -> list[str]:
    """Return where a run's losses leave those of the run it must follow, one sentence each."""
    ours, theirs = losses(folder), losses(reference)
    common = sorted(ours.keys() & theirs.keys())
    if len(common) < 3:
        return [f"{folder}: only {len(common)} steps to compare with {reference}, expected 3 or more"]
    largest = max(abs(ours[step] - theirs[step]) for step in common)
    print(f"{folder}: losses of steps {common[0]} to {common[-1]} within {largest:.1e} of {reference}")
    return [
        f"{folder}: the loss of step {step} is {ours[step]:.4f}, in {reference} it is {theirs[step]:.4f}"
        for step in common
        if not abs(ours[step] - theirs[step]) <= TOLERANCE
    ]


def main() -> int:
    """Check the folders on the command line."""
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    first, *others = map(Path, sys.argv[1:])
    found = problems(first) + [problem for folder in others for problem in deviations(folder, first)]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
