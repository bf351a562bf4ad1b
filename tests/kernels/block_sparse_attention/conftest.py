from __future__ import annotations

import pytest

from dit_opt.kernels.block_sparse_attention.impl.cpp import attention


@pytest.fixture
def torch_path(monkeypatch):
    """Attention by torch's operators, as where there is no compiler."""
    monkeypatch.setattr(attention, "fits", lambda call: "switched off")
