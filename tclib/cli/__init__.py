"""The command line: set-up, running the notebooks, testing. The core modules never import it."""
