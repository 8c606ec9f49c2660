"""What enters is checked where it enters: names, tokens, numbers of features and layers, files. One test per kind."""

from __future__ import annotations

import os

import pytest
import torch

import tclib as tc
from tclib.transcoder import Transcoder
from tests.tiny import make_transcoder


def test_a_dot_belongs_to_the_name(tmp_path):
    first, second = make_transcoder(0, seed=1), make_transcoder(0, seed=2, activation="topk", k=3)
    first.save(tmp_path / "l1_0.5", torch.float32)
    second.save(tmp_path / "l1_0.05", torch.float32)
    names = ["l1_0.05.json", "l1_0.05.safetensors", "l1_0.5.json", "l1_0.5.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name, saved in {"l1_0.5": first, "l1_0.05": second}.items():
        loaded = Transcoder.load(tmp_path / name)
        assert loaded.config == saved.config
        assert torch.equal(loaded.W_enc, saved.W_enc)
        assert torch.equal(Transcoder.load(tmp_path / f"{name}.safetensors").W_enc, saved.W_enc)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_weights_never_stand_beside_another_configuration(tmp_path, monkeypatch, fails_at):
    old, new = make_transcoder(0), make_transcoder(0, d_features=32)
    old.save(tmp_path / "layer_0")
    moves, real = [], os.replace

    def replace(source, target):
        moves.append(target)
        if len(moves) == fails_at:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    try:
        new.save(tmp_path / "layer_0")
    except OSError:
        pass
    monkeypatch.undo()
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"layer_0.safetensors", "layer_0.json"}
    if "layer_0.safetensors" in left:
        assert tc.load_transcoders(tmp_path)[0].config.d_features in (32, 64)
