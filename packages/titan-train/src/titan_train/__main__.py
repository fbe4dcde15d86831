"""`python -m titan_train`, for torchrun."""

from titan_train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
