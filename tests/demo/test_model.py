from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from dit_opt.demo.model import CheckpointError, load_model, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from diffusers import WanTransformer3DModel

    from dit_opt.demo.model import CONFIG

    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    torch.manual_seed(0)
    save_checkpoint(path, WanTransformer3DModel(**CONFIG).state_dict())
    return path


def test_a_saved_model_loads_ready_for_inference(checkpoint):
    model = load_model(checkpoint)
    assert not model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    # half precision, and at most the size that may ship
    assert checkpoint.stat().st_size < 16 * 2**20
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_missing_checkpoint_says_how_to_get_one(tmp_path):
    with pytest.raises(CheckpointError, match="is missing; reinstall"):
        load_model(tmp_path / "none.safetensors")


def test_a_truncated_checkpoint_is_refused(checkpoint, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(cut)


def test_a_foreign_checkpoint_is_refused(tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(foreign)
