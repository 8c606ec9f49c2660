"""How fast is the greedy path search? `tclib.circuits.path_search.greedy` against the paper's code or its plain rules.

The shape is GPT2-small's: 12 layers of width 768, a transcoder of 24,576 features in each, about 50 of them active per
token, a prompt of 10 tokens, 3 steps, 15 branches; the weights are random (decoder rows centred, as the paper's code
takes them to be). The target is the most active feature of layer 11 at the last token. With ``--original`` the search
functions are those of a clone of the paper's repository, unchanged (that file imports plotly), given this model and
transcoders that compute as theirs do. Without it, the same rules are written out below with dense products.

    OMP_NUM_THREADS=1 python benchmarks/path_search.py [--original FOLDER] [--rounds 2]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from setting import gpt2_sized, processor
from torch import Tensor
from transformer_lens import FactoredMatrix, utilities
from transformer_lens.model_bridge import TransformerBridge

from tclib import targets
from tclib.activations import hook_in, hook_out
from tclib.circuits.one_step import prompt_graph
from tclib.circuits.path_search import greedy
from tclib.replacement_model import ReplacementModel
from tclib.tracing import trace
from tclib.transcoder import Transcoder, TranscoderConfig

LAYERS, FEATURES, L0, POSITIONS, STEPS, BRANCHES = 12, 24_576, 50, 10, 3, 15
WORDS = 50_257


def random_transcoders(model: TransformerBridge, tokens: Tensor) -> dict[int, Transcoder]:
    """Random unit encoders, biased so that about `L0` features are active, and decoders of the MLP's size."""
    _, cache = model.run_with_cache(tokens[None])
    transcoders = {}
    for layer in range(LAYERS):
        config = TranscoderConfig(
            d_in=768, d_out=768, d_features=FEATURES, hook_in=hook_in(layer), hook_out=hook_out(layer)
        )
        transcoder = Transcoder(config).requires_grad_(False)
        transcoder.W_enc.normal_().div_(transcoder.W_enc.norm(dim=0))
        W_dec = transcoder.W_dec.normal_()
        W_dec -= W_dec.mean(1, keepdim=True)
        pre = cache[hook_in(layer)][0] @ transcoder.W_enc
        transcoder.b_enc.fill_(-pre.flatten().topk(L0 * len(tokens)).values[-1].item())
        y = cache[hook_out(layer)][0]
        W_dec *= y.norm() / (transcoder.encode(cache[hook_in(layer)][0]) @ W_dec).norm()
        transcoders[layer] = transcoder
    return transcoders


class Dense:
    """A transcoder as the paper's code calls one: ``(output, activations)``, all features at every call."""

    def __init__(self, layer: int, transcoder: Transcoder):
        self.W_enc, self.W_dec, self.transcoder = transcoder.W_enc, transcoder.W_dec, transcoder
        self.cfg = SimpleNamespace(
            hook_point=hook_in(layer), out_hook_point=hook_out(layer), hook_point_layer=layer, is_transcoder=True
        )

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        activations = self.transcoder.encode(x)
        return self.transcoder.decode(activations), activations


def by_original(folder: str, model, dense: list[Dense], cache, feature: int) -> list[dict[tuple, float]]:
    """The paths of the clone's `greedy_get_top_paths`: at each depth {names of nodes: contribution}."""
    spec = importlib.util.spec_from_file_location(
        "original_circuits", Path(folder, "transcoder_circuits", "circuit_analysis.py")
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("transformer_lens.utils", utilities)  # its name when that code was written
    spec.loader.exec_module(module)
    given = SimpleNamespace(W_O=model.W_O, OV=FactoredMatrix(model.W_V, model.W_O), blocks=model.blocks)
    root = module.make_sae_feature_vector(dense[-1], feature, token=-1)
    kept = module.greedy_get_top_paths(
        given, dense, cache, root, num_iters=STEPS, num_branches=BRANCHES, do_raw_attribution=True
    )
    return [{tuple(_original_name(v) for v in path[1:]): path[-1].contrib for path in paths} for paths in kept]


def _original_name(vector) -> str:
    last = vector.component_path[-1]
    if last.component_type.value == "embed":
        return f"embedding@{last.token}"
    if last.component_type.value == "attn":
        return f"attn{last.layer}.h{last.attn_head}@{last.token}"
    return f"mlp{last.layer}[{last.feature_idx}]@{last.token}"


def plainly(model, dense: list[Dense], cache, feature: int) -> list[dict[tuple, float]]:
    """The same rules with dense products, one node and layer at a time."""
    W_O, W_V, here = model.W_O, model.W_V, POSITIONS - 1
    scale = cache[f"blocks.{LAYERS - 1}.ln2.hook_scale"][0, here]
    paths, kept = [((), dense[-1].W_enc[:, feature] / scale, LAYERS - 1, True, here, 0.0)], []
    for _ in range(STEPS):
        found = []
        for names, reader, layer, is_mlp, position, _ in paths:
            if layer == 0 and not is_mlp:
                continue
            options = [((*names, f"embedding@{position}"), reader, 0, False, position,
                        (cache["blocks.0.hook_resid_pre"][0, position] @ reader).item())]  # fmt: skip
            for below in range(layer):
                x = cache[hook_in(below)]
                _output, z = dense[below](x)
                _missed = model.blocks[below].mlp(x)[0, position] - _output[0, position]  # its error term
                invariant = dense[below].W_dec @ reader
                best = (invariant * dense[below](x)[1][0, position]).topk(BRANCHES)
                divisor = cache[f"blocks.{below}.ln2.hook_scale"][0, position]
                for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    onward = dense[below].W_enc[:, i] * invariant[i] / divisor
                    options.append(((*names, f"mlp{below}[{i}]@{position}"), onward, below, True, position, value))
            for below in range(layer + is_mlp):
                pattern = cache[f"blocks.{below}.attn.hook_pattern"][0, :, position]
                values = cache[f"blocks.{below}.attn.hook_v"][0]
                through = torch.einsum("hs,shd,hde,e->hs", pattern, values, W_O[below], reader)[:, 1:]
                best = through.flatten().topk(min(BRANCHES, len(through)))
                for value, flat in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    head, source = flat // through.shape[1], flat % through.shape[1] + 1
                    divisor = cache[f"blocks.{below}.ln1.hook_scale"][0, source]
                    onward = W_V[below, head] @ (W_O[below, head] @ reader) * pattern[head, source] / divisor
                    options.append(((*names, f"attn{below}.h{head}@{source}"), onward, below, False, source, value))
            found += sorted(options, key=lambda option: -option[-1])[:BRANCHES]
        paths = sorted(found, key=lambda option: -option[-1])[:BRANCHES]
        kept.append({names: value for names, *_, value in paths})
    return kept


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", help="folder of a clone of the paper's repository")
    parser.add_argument("--rounds", type=int, default=2, help="how often the slow side runs")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = gpt2_sized()
    tokens = torch.randint(0, WORDS, (POSITIONS,))
    tokens[0] = model.tokenizer.bos_token_id
    transcoders = random_transcoders(model, tokens)
    dense = [Dense(layer, transcoder) for layer, transcoder in transcoders.items()]

    def ours(feature: int | None) -> tuple[list[dict[tuple, float]], list[float], int]:
        clock = [time.process_time()]
        traced = trace(ReplacementModel(model, transcoders), tokens, check_fit=False)
        clock.append(time.process_time())
        graph = prompt_graph(traced)
        clock.append(time.process_time())
        feature = int(traced.features[LAYERS - 1][-1].argmax()) if feature is None else feature
        kept = greedy(graph, targets.feature(traced, LAYERS - 1, feature), STEPS, BRANCHES)
        clock.append(time.process_time())
        parts = [after - before for before, after in zip(clock, clock[1:], strict=False)]
        l0 = sum(int((z != 0).sum()) for z in traced.features.values()) / LAYERS / POSITIONS
        found = [{tuple(node.name for node in path.nodes): path.contribution for path in paths} for paths in kept]
        return found, [*parts, l0], feature

    def theirs(feature: int) -> tuple[list[dict[tuple, float]], list[float]]:
        start = time.process_time()
        _, cache = model.run_with_cache(tokens[None])
        middle = time.process_time()
        if arguments.original:
            found = by_original(arguments.original, model, dense, cache, feature)
        else:
            found = plainly(model, dense, cache, feature)
        return found, [middle - start, time.process_time() - middle]

    _, _, feature = ours(None)  # warm-up
    fast, slow = [], []
    for _ in range(arguments.rounds):  # alternating, so that both meet the same machine
        expected, times = theirs(feature)
        slow.append(times)
        for _ in range(5):
            found, times, _ = ours(feature)
            fast.append(times)
    for depth, (mine, other) in enumerate(zip(found, expected, strict=True), 1):
        same = mine.keys() == other.keys()
        gap = max(abs(mine[path] - other[path]) for path in mine.keys() & other.keys())
        print(f"depth {depth}: {len(other)} paths, identical sets: {same}, largest gap {gap:.1e}")
        assert same and gap < 1e-4
    forward, setup, search = (min(column) for column in list(zip(*fast, strict=True))[:3])
    whole = min(sum(times[:3]) for times in fast)
    their_search, their_whole = min(times[1] for times in slow), min(map(sum, slow))
    name = "the paper's code" if arguments.original else "a plain version of the paper's search"
    print(f"CPU: {processor()}, {torch.get_num_threads()} thread(s) of {os.cpu_count()}")
    print(f"L0 {fast[0][3]:.0f}; best of {len(slow)} and {len(fast)} runs, CPU time")
    print(f"{name}: search {their_search:.2f} s, with the forward pass {their_whole:.2f} s")
    print(f"ours: trace {1e3 * forward:.0f} ms, set-up {1e3 * setup:.0f} ms, search {1e3 * search:.1f} ms")
    a, b = their_search / search, their_whole / whole
    after = their_search / (setup + search)
    search_bound, end_bound = ("met" if ok else "MISSED" for ok in (a >= 1000, b >= 50))
    goal = "met" if b >= 80 else "missed"
    print(
        f"path search: {a:.0f}x {name} after set-up, {after:.0f}x with set-up, {b:.0f}x end to end; "
        f"1000x {search_bound}, 50x {end_bound}, goal 80x {goal}; identical paths"
    )


if __name__ == "__main__":
    main()
