"""Make the bundled language model.

python -m making.language_model prepare --real FOLDER --out WORK
python -m making.language_model train --work WORK --seed 1 --tokens 40_000_000 --run RUN
python -m making.language_model export --work WORK --run RUN --out data/model
"""

import argparse
import json
import os
import signal
import sys
from dataclasses import fields
from pathlib import Path
from threading import Event

import torch

from making.export import export, held_out_bits
from making.tokenizer import CONTEXT, VOCABULARY
from making.training import Settings, train
from making.training_text import HELD_OUT, prepare

# glibc gives large blocks back to the system and faults them in again at each step: up to 2x slower.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "500000000",
}


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    if options.command == "prepare":
        prepare(options.real, options.out, options.chronicle_tokens, options.holdout, VOCABULARY, CONTEXT)
    elif options.command == "train":
        keep_memory(arguments)
        torch.set_num_threads(options.threads)
        torch.set_flush_denormal(True)
        names = {field.name for field in fields(Settings)} - {"vocabulary"}
        settings = Settings(**{name: getattr(options, name) for name in names}, vocabulary=VOCABULARY)
        train(options.work, options.run, settings, stop=finish_the_step_on_interrupt(), device=options.device)
    else:
        model = export(options.work, options.run, options.out)
        print(json.dumps(held_out_bits(model, options.work), indent=2))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m making.language_model", description=__doc__)
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = top.add_subparsers(dest="command", required=True)

    command = commands.add_parser("prepare", help="tokenizer and ids from the text")
    command.add_argument("--real", type=Path, required=True, help="folder of .txt files")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--chronicle-tokens", type=int, default=40_000_000)
    command.add_argument("--holdout", nargs="*", default=HELD_OUT, help="names without .txt")

    command = commands.add_parser("train", help="train, or take up a run that was stopped")
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--run", type=Path, required=True)
    command.add_argument("--seed", type=int, required=True)
    command.add_argument("--tokens", type=int, required=True)
    command.add_argument("--d-model", type=int, default=256)
    command.add_argument("--layers", type=int, default=3)
    command.add_argument("--heads", type=int, default=8)
    command.add_argument("--real-fraction", type=float, default=0.4)
    command.add_argument("--batch", type=int, default=32)
    command.add_argument("--context", type=int, default=CONTEXT)
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--device", default="cpu", help="cpu or cuda")

    command = commands.add_parser("export", help="write a Hugging Face folder and check it")
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--run", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    return top


def keep_memory(arguments: list[str]) -> None:
    """Start again with glibc's settings in the environment, the only place where it reads them."""
    if sys.platform == "linux" and any(os.environ.get(k) != v for k, v in KEEP_MEMORY.items()):
        command = [sys.executable, "-m", "making.language_model", *arguments]
        os.execve(sys.executable, command, os.environ | KEEP_MEMORY)


def finish_the_step_on_interrupt() -> Event:
    stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


if __name__ == "__main__":
    main(sys.argv[1:])
