"""`python -m tclib COMMAND`; without a command it lists them all (`tclib.cli.bootstrap.COMMANDS`)."""

import sys

from tclib.cli.bootstrap import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
