"""Every block, in the graph's own order: what `density=1` asks for."""

from __future__ import annotations

from typing import ClassVar

import sympy
import torch

from dit_opt.routers.base import BLOCK_K, BLOCK_Q, Routed, Router, SiteWriter


class KeepAll(Router):
    """Lists with every block; it is no value of the option `router`."""

    name = "keep_all"
    searches: ClassVar[bool] = False

    def count_pairs(self, tokens: sympy.Expr) -> sympy.Expr:
        return sympy.Integer(0)

    def search(self, site: SiteWriter) -> Routed:
        emit, length = site.emit, site.emit.size(site.k, -2)
        plan = emit.call(torch.ops.ditopt.keep_all_v1.default, site.q, length, BLOCK_Q, BLOCK_K)
        counts, indices = emit.unpack(plan, 2)
        return Routed(site.q, site.k, site.v, site.bias, counts, indices)
