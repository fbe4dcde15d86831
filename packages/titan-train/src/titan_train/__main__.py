"""`python -m titan_train`, which torchrun and `--nproc` start."""

from titan_train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
