"""Block layouts know sizes, text and the diagonal; masks become lists."""

from __future__ import annotations

import pytest
import torch

from dit_opt.kernels.cpp.build import load_library
from dit_opt.kernels.plan import plan
from dit_opt.kernels.plan.plan import check_request, lay_blocks, list_kept
from tests.kernels.searches.scenes import CPU, SCENES


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_what_is_always_kept_is_what_the_rule_says_token_by_token(scene):
    blocks = scene.blocks
    text = torch.ones(scene.tokens, dtype=torch.bool)
    text[scene.video_start : scene.video_start + scene.video_tokens] = False
    by_token = text[:, None] | text | torch.eye(scene.tokens, dtype=torch.bool)
    for i, rows in enumerate(by_token.split(scene.block_q)):
        for j, tile in enumerate(rows.split(scene.block_k, 1)):
            assert blocks.always_kept[i, j] == tile.any()
            assert (blocks.query_sizes[i], blocks.key_sizes[j]) == tile.shape


@pytest.fixture(params=["cpp", "torch"])
def path(request, monkeypatch):
    """The C++ kernel, where there is a compiler, and torch's operators."""
    if request.param == "torch":
        monkeypatch.setattr(plan.cpp, "list_blocks", lambda _: None)
    elif load_library() is None:
        pytest.skip("there is no C++ compiler")


@pytest.mark.usefixtures("path")
def test_lists_are_ascending_int32_and_zero_after_their_count():
    mask = torch.rand(3, 7, 11, generator=torch.Generator().manual_seed(0)) < 0.4
    counts, indices = list_kept(mask)
    assert counts.dtype == indices.dtype == torch.int32
    for row, count, index in zip(
        mask.flatten(0, 1), counts.flatten(), indices.flatten(0, 1), strict=True
    ):
        assert index[:count].tolist() == row.nonzero().flatten().tolist()
        assert not index[count:].any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="video of 9 tokens from token 2 on"):
        lay_blocks(10, 2, 9, 16, 16, CPU)
    with pytest.raises(ValueError, match="Blocks of 16 x 0 tokens are empty"):
        lay_blocks(10, 0, 10, 16, 0, CPU)
    blocks = lay_blocks(64, 0, 64, 32, 16, CPU)
    x = torch.zeros(1, 2, 64, 8)
    check_request(x, x, blocks)
    with pytest.raises(ValueError, match="64 queries and 63 keys"):
        check_request(x, x[:, :, 1:], blocks)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        check_request(torch.zeros(1, 3, 64, 8), x, blocks)
