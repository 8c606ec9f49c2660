"""`python -m tclib venv|run|test|test-all|lab`."""

import sys

from tclib.cli.bootstrap import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
