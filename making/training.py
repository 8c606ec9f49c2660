"""Training of the bundled model: Muon on the blocks' matrices, AdamW on the rest.

The batch of step i depends on (seed, i) only, so a run that is interrupted and taken up again ends
with the same weights as one that never stopped.
"""

import io
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from making.gpt2 import GPT2
from making.tokenizer import SEPARATOR
from tclib.io.paths import write_whole

PEAK_LR = 3e-3
WARM_UP_STEPS = 150
HOLD = 0.1  # share of the steps before the rate starts to fall
WEIGHT_DECAY = 0.1
STEPS_PER_LOG_LINE = 100


@dataclass(frozen=True)
class Settings:
    """What decides the trained weights, besides the text."""

    seed: int
    tokens: int
    d_model: int
    layers: int
    heads: int
    real_fraction: float
    batch: int
    context: int
    vocabulary: int

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.context)

    def model(self) -> GPT2:
        torch.manual_seed(self.seed)
        return GPT2(self.vocabulary, self.d_model, self.layers, self.heads, self.context)


class Source:
    """Training rows from one file of ids; half of them start where a document or paragraph does."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self.ids = np.load(path)
        self.separator = tokenizer.token_to_id(SEPARATOR)
        breaks = (self.ids[1:] == tokenizer.encode("\n").ids[0]) & (self.ids[1:] == self.ids[:-1])
        self.starts = np.flatnonzero((self.ids == self.separator) | np.append(False, breaks))

    def row(self, rng: np.random.Generator, length: int) -> np.ndarray:
        last = len(self.ids) - length
        start = rng.integers(last + 1)
        if rng.random() < 0.5:
            start = min(self.starts[rng.integers(len(self.starts))], last)
        row = self.ids[start : start + length].astype(np.int64)
        row[0] = self.separator  # every row starts with BOS
        return row


def draw_batch(real: Source, chronicle: Source, settings: Settings, step: int) -> tuple[Tensor, Tensor]:
    """Rows of context + 1 ids, and which of them are real text."""
    rng = np.random.default_rng([settings.seed, step])
    is_real = rng.random(settings.batch) < settings.real_fraction
    length = settings.context + 1
    rows = [(real if it else chronicle).row(rng, length) for it in is_real]
    return torch.from_numpy(np.stack(rows)), torch.from_numpy(is_real)


def rate(step: int, steps: int) -> float:
    """The learning rate as a share of its peak: warm-up, hold, then linear to zero."""
    return min((step + 1) / WARM_UP_STEPS, 1.0, (steps - step) / ((1 - HOLD) * steps))


def make_optimizers(model: GPT2) -> list[torch.optim.Optimizer]:
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        in_block = name.startswith("h.") and parameter.dim() == 2
        (matrices if in_block else rest).append(parameter)
    muon = torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adamw]


def train(
    work: Path,
    run: Path,
    settings: Settings,
    seconds_per_checkpoint: float = 300.0,
    stop: Event | None = None,
    device: str = "cpu",
) -> GPT2:
    """Train to the end, or until `stop` is set; take up the run's last checkpoint if it has one.

    Start and batches are the same on every device, the last bits of the weights are not.
    """
    claim(run, settings)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    real = Source(work / "real_train.npy", tokenizer)
    chronicle = Source(work / "chronicle_train.npy", tokenizer)
    model = settings.model().to(device)
    optimizers = make_optimizers(model)
    first = load_checkpoint(run, model, optimizers)
    log = Log(run / "log.jsonl", settings, first)
    saved_at = time.monotonic()
    for step in range(first, settings.steps):
        rows, is_real = draw_batch(real, chronicle, settings, step)
        rows = rows.to(device)
        loss, each = model.loss(rows[:, :-1], rows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * rate(step, settings.steps)
            optimizer.step()
            optimizer.zero_grad()
        log.step(step, each.cpu(), is_real)
        done = step + 1
        stopping = stop is not None and stop.is_set()
        due = time.monotonic() - saved_at >= seconds_per_checkpoint
        if stopping or due or done == settings.steps:
            save_checkpoint(run, done, model, optimizers)
            saved_at = time.monotonic()
        if stopping:
            log.say(f"stopped after step {done} of {settings.steps}; the same command goes on")
            break
    return model


def claim(run: Path, settings: Settings) -> None:
    """Note the settings in the run's folder, or refuse a folder that was begun with others."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / "settings.json"
    if path.exists() and json.loads(begun := path.read_text(encoding="utf-8")) != asdict(settings):
        raise SystemExit(f"{run} was begun with other settings: {begun}")
    path.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


def checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoint_*.pt"))


def save_checkpoint(run: Path, step: int, model: GPT2, optimizers: list[torch.optim.Optimizer]) -> None:
    """Write whole or not at all, then drop all but the last two."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    content = io.BytesIO()
    torch.save(state, content)
    write_whole(run / f"checkpoint_{step:08d}.pt", content.getvalue())
    for old in checkpoints(run)[:-2]:
        old.unlink()


def load_checkpoint(run: Path, model: GPT2, optimizers: list[torch.optim.Optimizer]) -> int:
    """Fill in the newest checkpoint's state and return the number of steps done, 0 without one."""
    found = checkpoints(run)
    if not found:
        return 0
    state = torch.load(found[-1], weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    for optimizer, its_state in zip(optimizers, state["optimizers"], strict=bool(optimizers)):
        optimizer.load_state_dict(its_state)
    return state["step"]


class Log:
    """A progress bar on a terminal, log lines elsewhere; `log.jsonl` in either case."""

    def __init__(self, path: Path, settings: Settings, first: int) -> None:
        self.path, self.settings, self.first = path, settings, first
        self.began = time.monotonic()
        self.bar = tqdm(total=settings.steps, initial=first, disable=not sys.stderr.isatty())
        self.sums = {"real": [0.0, 0], "chronicle": [0.0, 0]}

    def step(self, step: int, each: Tensor, is_real: Tensor) -> None:
        for name, rows in (("real", each[is_real]), ("chronicle", each[~is_real])):
            self.sums[name][0] += rows.sum().item()
            self.sums[name][1] += rows.numel()
        self.bar.update()
        done = step + 1
        if done % STEPS_PER_LOG_LINE and done != self.settings.steps:
            return
        seconds = time.monotonic() - self.began
        steps_per_second = (done - self.first) / seconds
        line = {
            "step": done,
            "steps": self.settings.steps,
            "tokens": done * self.settings.batch * self.settings.context,
            **{f"{name}_loss": round(s / n, 4) for name, (s, n) in self.sums.items() if n},
            "tokens_per_second": round(steps_per_second * self.settings.batch * self.settings.context),
            "seconds_left": round((self.settings.steps - done) / steps_per_second),
        }
        self.sums = {name: [0.0, 0] for name in self.sums}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.say(json.dumps(line))

    def say(self, text: str) -> None:
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.write(text)
