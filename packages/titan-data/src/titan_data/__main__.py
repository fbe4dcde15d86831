"""`python -m titan_data` is `titan-data`."""

import sys

from titan_data.cli import main

if __name__ == "__main__":
    sys.exit(main())
