"""Check that a debug run learnt what it should: `python tools/check_run.py runs/debug [more folders]`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

VOCABULARY = 264
BOUND = 2.3  # nats per byte


def problems(folder: Path) -> list[str]:
    """Return what is wrong with a run, one sentence each."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return [f"{path} does not exist"]
    losses = {m["step"]: m["loss"] for m in map(json.loads, path.read_text("utf-8").splitlines())}
    found = []
    if abs(losses[1] - math.log(VOCABULARY)) > 0.2:
        found.append(f"{folder}: the first loss is {losses[1]:.3f}, not about ln({VOCABULARY})")
    last = sorted(losses)[-5:]
    final = sum(losses[step] for step in last) / len(last)
    print(f"{folder}: loss {losses[1]:.3f} at step 1, {final:.3f} on average over steps {last}")
    if not final < BOUND:
        found.append(f"{folder}: the final loss is {final:.3f}, not under {BOUND}")
    wanted = ("config.toml", "tensorboard", "checkpoints")
    found.extend(f"{folder / name}: missing" for name in wanted if not (folder / name).exists())
    return found


def main() -> int:
    """Check the folders on the command line."""
    found = [problem for folder in sys.argv[1:] for problem in problems(Path(folder))]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found or len(sys.argv) < 2 else 0


if __name__ == "__main__":
    raise SystemExit(main())
