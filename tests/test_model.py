"""Which models are taken, and why others are not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tclib as tc
from tclib.blocks import Block, check_architecture
from tclib.io.memory import check_memory
from tclib.model import layer_norms
from tests.tiny import make_model

OTHERS = {
    "cohere": ({"model_type": "cohere"}, "its attention and MLP share one LayerNorm"),
    "granite": ({"model_type": "granite"}, "its blocks scale what they write"),
    "gemma3": ({"model_type": "gemma3"}, "it sees images beside the text"),
    "quantised llama": ({"model_type": "llama", "quantization_config": {"bits": 4}}, "its weights are quantised"),
    "mixtral": ({"model_type": "mixtral", "num_local_experts": 8}, "its MLPs are mixtures of experts"),
    "bloom": ({"model_type": "bloom", "alibi": True}, "ALiBi position biases"),
    "t5": ({"model_type": "t5", "is_encoder_decoder": True}, "has an encoder beside the decoder"),
    "gptj": ({"model_type": "gptj"}, "its attention and MLP share one LayerNorm"),
    "gpt_neo": ({"model_type": "gpt_neo"}, "its attention is local in every other layer"),
    "mamba": ({"model_type": "mamba"}, "it has no attention"),
    "opt": ({"model_type": "opt"}, "positions and its MLP's activation differ"),
    "unknown": ({"model_type": "brandnew"}, "its blocks are not the same as theirs"),
    "no type": ({}, "its blocks are not the same as theirs"),
    "gated gpt_neox": ({"model_type": "gpt_neox", "hidden_act": "swiglu"}, "its MLPs are gated"),
    "cross gpt2": ({"model_type": "gpt2", "add_cross_attention": True}, "also attend to an encoder"),
    "quantised gpt2": ({"model_type": "gpt2", "quantization_config": {"bits": 4}}, "its weights are quantised"),
}


@pytest.mark.parametrize("which", OTHERS)
def test_other_architectures_are_refused_by_the_property_that_does_not_fit(which):
    config, reason = OTHERS[which]
    with pytest.raises(ValueError, match="only GPT-2, .* blocks are supported, and") as caught:
        check_architecture(config, "here")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_by_inverse_layer_idx": True},
        {"model_type": "gpt_neox", "hidden_act": "gelu", "num_attention_heads": 16, "use_parallel_residual": True},
        {"model_type": "llama", "hidden_act": "silu", "num_attention_heads": 9, "num_key_value_heads": 3},
    ],
)
def test_gpt2_pythia_and_smollm_are_not(config):
    check_architecture(config, "here")


@pytest.mark.parametrize("blocks", ["gpt2", "neox", "neox-sequential", "llama", "gemma2"])
def test_layer_norms_are_those_on_disk(tmp_path, blocks):
    plain = make_model(tmp_path, blocks=blocks, processed=False)
    processed = make_model(tmp_path, blocks=blocks)
    for model in (plain, processed):
        for layer, (gain, bias) in layer_norms(model, [0, 1]).items():
            norm = Block.of(plain, layer).before_mlp
            torch.testing.assert_close(gain, norm.gain)
            torch.testing.assert_close(bias, norm.bias)
    with pytest.raises(ValueError, match="no norm before the MLP of layer 7"):
        layer_norms(plain, [7])


def _in_two_files(folder):
    """The weights as larger models have them."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, inside in parts.items():
        save_file({name: whole[name] for name in inside}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def test_weights_in_several_files_are_the_same_model(tmp_path):
    tokens = torch.tensor([[40, 1, 2, 3]])
    whole = make_model(tmp_path, blocks="llama")
    norms = layer_norms(whole, [1])[1]
    _in_two_files(tmp_path)
    parts = tc.load_model(str(tmp_path), device="cpu")
    torch.testing.assert_close(parts(tokens), whole(tokens), rtol=0, atol=0)
    torch.testing.assert_close(layer_norms(parts, [1])[1], norms)


@pytest.mark.parametrize(
    ("weight_map", "sentence"),
    [
        ({"a": "model-00001-of-00003.safetensors"}, "model-00001-of-00003.safetensors is missing"),
        ({"a": "../model-00001-of-00002.safetensors"}, "it lists no files like"),
        ({}, "it lists no files like"),
        ("model-00001-of-00002.safetensors", "it lists no files like"),
    ],
)
def test_an_index_that_does_not_fit_its_folder_gets_one_sentence(tmp_path, weight_map, sentence):
    make_model(tmp_path, blocks="llama")
    _in_two_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        tc.load_model(str(tmp_path), device="cpu")


def test_what_does_not_fit_into_memory_is_said_before(tmp_path, monkeypatch):
    make_model(tmp_path)
    monkeypatch.setattr("tclib.io.memory.available_memory", lambda device="cpu": 1000)
    with pytest.raises(ValueError, match=r"this needs model .* \+ while it loads .* GB of memory and .* are available"):
        tc.load_model(str(tmp_path), device="cpu")


def test_a_plan_adds_up():
    plan = check_memory({"model": 10**6, "peak": 2 * 10**6})["GB"]
    assert plan["together"] == pytest.approx(0.003) and plan["available"] > 0.003


def test_a_folder_of_other_blocks_is_refused_before_its_weights_are_read(tmp_path):
    make_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"never looked at")
    with pytest.raises(ValueError, match="it has no attention"):
        tc.load_model(str(tmp_path), device="cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_trace_on_cuda_is_that_on_the_cpu():
    prompt = "The war lasted from the year 1732 to the year 17"
    traces = [
        tc.trace(tc.ReplacementModel(tc.load_model(device=d), tc.load_transcoders(device=d)), prompt)
        for d in ("cpu", "cuda")
    ]
    torch.testing.assert_close(traces[1].logits.cpu(), traces[0].logits, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no MPS")
def test_a_trace_on_mps_is_that_on_the_cpu():
    prompt = "The war lasted from the year 1732 to the year 17"
    traces = [
        tc.trace(tc.ReplacementModel(tc.load_model(device=d), tc.load_transcoders(device=d)), prompt)
        for d in ("cpu", "mps")
    ]
    torch.testing.assert_close(traces[1].logits.cpu(), traces[0].logits, rtol=1e-3, atol=1e-3)
