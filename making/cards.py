"""Write data/README.md and the model's card from what the other scripts left behind; no number is typed.

    python -m making.cards --work WORK --run RUN --candidates RUN ... --manifest MANIFEST.csv

WORK is the folder that `making.language_model prepare` wrote, RUN that of the chosen training run. Each candidate run
holds the metrics.json that `making.measure --nouns selection` wrote. MANIFEST.csv lists the works (columns file, title,
author, year).
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from making.measure import APART, judge, smallest_drop, verdicts
from making.transcoders import COMPARED_K, COMPARED_STEPS
from tclib.chronicle import HELD_OUT_CENTURY, NOUNS
from tclib.chronicle.words import DURATIONS
from tclib.io.gguf_model import sha256
from tclib.io.paths import data_path

LICENCE = "CC0 1.0 (made by this project)"
ORIGIN = {
    "model": "`python -m making.language_model`; card by `making.cards`, metrics by `making.measure`",
    "transcoders": "`python -m making.transcoders`",
    "text": "`python -m making.sampled_text`: sampled from the bundled model, not real text",
    "published.json": "typed from the papers named in it",
    "blind": "`python -m making.blind`",
    "features.npz": "`python -m making.features`",
    "fronts.json": "`python -m making.fronts`",
    "sweep.json": "`python -m making.sweep`",
    "ablations.json": "`python -m making.ablations`",
    "smollm2": "`python -m making.smollm2`; `claims.json` by notebook 09, `successors.json` by notebook 11b, "
    "`controls.json` by `making.smollm2_controls`",
    "clt": "`python -m making.cross_layer`",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m making.cards", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--candidates", type=Path, nargs="+", required=True)
    parser.add_argument("--controls", type=Path, nargs="*", default=[], help="runs on text without durations by noun")
    parser.add_argument("--manifest", type=Path, required=True)
    options = parser.parse_args()
    data = data_path()
    card = model_card(
        data / "model", options.work, options.run, options.candidates, options.controls, pd.read_csv(options.manifest)
    )
    (data / "model" / "README.md").write_text(card, encoding="utf-8")
    (data / "README.md").write_text(data_page(data), encoding="utf-8")


def data_page(data: Path) -> str:
    """Every file of ``data/`` but this page: size, checksum, how it was made, licence."""
    rows = ["| file | bytes | SHA-256 | made by | licence |", "|---|---:|---|---|---|"]
    for path in files(data):
        name = path.relative_to(data).as_posix()
        rows.append(
            f"| `{name}` | {path.stat().st_size} | `{sha256(path)}` | {ORIGIN[name.split('/')[0]]} | {LICENCE} |"
        )
    total = sum(path.stat().st_size for path in files(data)) / 1e6
    widths = pd.DataFrame(json.loads((data / "transcoders" / "comparison.json").read_text(encoding="utf-8")))
    compared = widths.pivot_table(index="name", columns=["text", "layer"], values="fvu", sort=False).round(3)
    compared.columns = [f"{text}, {layer}" for text, layer in compared.columns]
    return (
        "# Data\n\n"
        f"Everything here was made by this project's own code ({total:.1f} MB in all); no file was downloaded, and "
        "none holds text of another author. `model/README.md` is the card of the language model; "
        "`model/metrics.json` and `transcoders/report.json` hold what was measured.\n\n" + "\n".join(rows) + "\n\n"
        "The text of the training corpus is not part of the project. A wheel carries this folder as `tclib/data`.\n\n"
        "## Widths and the skip path\n\n"
        f"By `python -m making.transcoders --compare`: {COMPARED_STEPS} steps on {widths['tokens'].iloc[0]:,} tokens, "
        f"the {COMPARED_K} largest features of each token kept (TopK), so that all have one L0. FVU on chronicle and "
        "on held-out real prose, by layer:\n\n" + table(compared, "transcoder") + "\n"
    )


def files(data: Path) -> list[Path]:
    return sorted(path for path in data.rglob("*") if path.is_file() and path != data / "README.md")


def model_card(
    folder: Path, work: Path, run: Path, candidates: list[Path], controls: list[Path], manifest: pd.DataFrame
) -> str:
    """Recipe, data, selection, measured numbers, limits."""
    settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    facts = json.loads((work / "text.json").read_text(encoding="utf-8"))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    apart = metrics["nouns_kept_apart"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    held_out = manifest[manifest["file"].str.removesuffix(".txt").isin(facts["held_out"])]
    trained_on = manifest.drop(held_out.index)
    numbers = pd.DataFrame(
        {name: {k: values[k] for k in NUMBERS} for name, values in metrics["by_nouns"].items()}
    ).T.round(3)
    return CARD.format(
        layers=config["n_layer"],
        d_model=config["n_embd"],
        heads=config["n_head"],
        vocabulary=config["vocab_size"],
        context=config["n_positions"],
        settings=json.dumps(settings),
        seed=settings["seed"],
        tokens=settings["tokens"],
        history=history(run),
        candidates=selection(candidates, controls),
        durations=table(durations(), "mean in years"),
        unseen=metrics["century_never_seen"]["probability_difference"],
        century=HELD_OUT_CENTURY,
        real=facts["real_tokens"] / 1e6,
        chronicle=facts["chronicle_tokens"] / 1e6,
        share=settings["real_fraction"],
        verdicts="\n".join(f"* {line}" for line in verdicts(metrics)),
        numbers=table(numbers, "nouns"),
        drops=table(pd.DataFrame(metrics["mlp_drops"][apart]).set_index("layer").round(3) + 0.0, "layer"),
        bits=table(pd.Series(metrics["bits_per_char_by_work"], name="bits per character").round(3).to_frame(), "work"),
        held_out=works(held_out),
        trained_on=works(trained_on),
    )


NUMBERS = ("prompts", "probability_difference", "balanced_difference", "sharpness")


def history(run: Path) -> str:
    """Whether the planned length was changed on the way, which the log shows."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    plans = list(dict.fromkeys(line["steps"] for line in lines))
    if len(plans) == 1:
        return f"The run was taken through in {plans[0]} steps."
    changes = [next(line["step"] for line in lines if line["steps"] == plan) for plan in plans[1:]]
    cuts = ", ".join(f"to {plan} before step {step}" for plan, step in zip(plans[1:], changes, strict=True))
    return (
        f"The run was planned for {plans[0]} steps and shortened {cuts}, for lack of processor time; the learning rate "
        "followed each new plan from there on, so the command above gives other weights of the same kind."
    )


def selection(candidates: list[Path], controls: list[Path]) -> str:
    """Targets beside results for all candidates and controls, measured on nouns kept for choosing."""
    columns = {}
    for run in [*candidates, *controls]:
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        if metrics[APART] != "selection":
            raise SystemExit(f"{run / 'metrics.json'} was measured on the nouns of the report: choose with the others")
        settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
        judged = judge(metrics)
        cells = {f"{name} ({limit})": f"{value:.3g}{'' if met else ' missed'}" for name, value, limit, met in judged}
        cells |= {"targets met": f"{sum(met for *_, met in judged)} of {len(judged)}"}
        cells |= {"smallest of the four losses": f"{smallest_drop(metrics):.3f}"}
        unseen = metrics["century_never_seen"]["probability_difference"]
        cells |= {"probability difference in the century never seen": f"{unseen:.3f}"}
        label = f"{settings['heads']} heads, seed {settings['seed']}, {settings['tokens'] / 1e6:.0f}M tokens"
        columns[label + (", no durations" if run in controls else "")] = cells
    return table(pd.DataFrame(columns), "target")


def durations() -> pd.DataFrame:
    """The nouns of each mean duration; those that never occur in the training text in brackets."""
    known = set(NOUNS["train"])
    nouns = {mean: ", ".join(n if n in known else f"({n})" for n in names) for mean, names in DURATIONS.items()}
    return pd.Series(nouns, name="nouns").to_frame()


def table(frame: pd.DataFrame, index: str) -> str:
    head = [index, *map(str, frame.columns)]
    rows = [
        [str(name), *(value if isinstance(value, str) else f"{value:g}" for value in values)]
        for name, values in zip(frame.index, frame.to_numpy(), strict=True)
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def works(manifest: pd.DataFrame) -> str:
    return "\n".join(f"* {row.title}, {row.author} ({row.year})" for row in manifest.itertuples())


CARD = """# The bundled language model

A GPT-2 with {layers} layers, width {d_model}, {heads} heads per layer, {vocabulary} byte-level BPE entries and a
context of {context} tokens, trained from scratch for this collection. Digits are split into pairs, so "1732" is
" 17" + "32" as in GPT-2. It exists to show, on any laptop, the behaviours that the paper studied in GPT-2 small.

## Recipe

    python -m making.language_model prepare --real FOLDER --out WORK
    python -m making.language_model train --work WORK --run RUN --seed {seed} --heads {heads} --tokens {tokens}
    python -m making.language_model export --work WORK --run RUN --out data/model

Settings: `{settings}`. Muon on the blocks' matrices, AdamW on the rest, peak learning rate 3e-3, 150 steps of
warm-up, constant for a tenth, then linear to zero. {history} With `--device cuda` a GPU needs two minutes, one core
of a processor forty; start and batches are the same on both, the last bits of the weights are not.

## Data

{share:.0%} of the rows are English prose ({real:.1f} million tokens of public-domain works, listed below), the rest is
chronicle ({chronicle:.0f} million tokens from `tclib.chronicle`, a grammar written for this project).

How long something lasts depends on the noun. A duration is geometric with the mean below: one year is the likeliest,
two years the next. Nouns in brackets never occur in the training text. Start years lie in the centuries 10 to 20, but
no year of the {century}00s is ever written, and prose that names one was left out; so "in every century" can be tested
in one never seen. 15% of the sentences with two years are backward (the later year comes first).

{durations}

## What was measured

By `python -m making.measure --model data/model --transcoders data/transcoders --real-work WORK`, on nouns kept apart
for the report where known nouns are not named; all numbers are in `metrics.json`.

{verdicts}

In the {century}00s, a century never seen, the probability difference of known nouns is {unseen:.3f}.

{numbers}

Probability difference lost at the last token when one MLP is zeroed or held at its mean over YY, and when it is zeroed
at all tokens:

{drops}

Bits per character on whole works that the model never saw:

{bits}

## Selection

The targets were written down before any candidate was measured (`REQUIRED` in `making/measure.py`): the probability
difference itself, and what is lost of it when the key MLP, found by code, is set to zero or to its mean over YY at the
last token, with the scales of later LayerNorms free and held. Candidates are compared on nouns kept for choosing
(`making.measure --nouns selection`): the one that meets most targets is taken, and among equals the one with the
largest smallest loss. Nothing was chosen on the nouns of the report. The candidates of this version:

{candidates}

## Limits

Prose samples are locally grammatical, not coherent. Years are written the way the chronicle writes them. Whatever is
found in this model is true of this model; published numbers of GPT-2 are quoted beside ours, never replaced by them.

## Held-out works

{held_out}

## Works trained on

{trained_on}
"""


if __name__ == "__main__":
    main()
