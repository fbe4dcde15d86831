"""Run the command line `titan-data` as `python -m titan_data`."""

import sys

from titan_data.cli import main

if __name__ == "__main__":
    sys.exit(main())
