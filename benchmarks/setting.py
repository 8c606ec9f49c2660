"""What the benchmarks share: the processor's name and a random model of GPT-2 small's shape.

Torch and tclib are imported where they are used, since contenders start these files with the Python of another tool.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def processor() -> str:
    """Its name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def gpt2_sized() -> TransformerBridge:
    """12 layers of width 768 with random weights and the bundled tokenizer, whose years are two tokens as in GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from tclib.io.paths import data_path
    from tclib.model import load_model

    with tempfile.TemporaryDirectory() as folder:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(data_path("model", name), folder)
        bos = load_model().tokenizer.bos_token_id
        GPT2LMHeadModel(GPT2Config(bos_token_id=bos, eos_token_id=bos)).save_pretrained(folder)
        return load_model(folder, device="cpu")
