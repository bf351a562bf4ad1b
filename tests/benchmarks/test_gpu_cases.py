"""Plans of the GPU benchmark: densities, own blocks, order, and what the kinds differ in."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_cases import Case, list_cases, make_inputs, make_plan, measure_density

CPU = torch.device("cpu")


@pytest.mark.parametrize("plan", ["random", "video"])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_plans_have_their_density_and_keep_their_own_blocks(plan, density):
    case = Case(16, 4000, 2, density, plan=plan)
    counts, indices = make_plan(case, CPU)
    assert measure_density(case, counts) == pytest.approx(density, rel=0.1)
    assert len(counts.unique()) > 3
    used = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
    assert bool((indices.diff(dim=-1)[used[..., 1:]] > 0).all())
    for row in range(indices.shape[2]):
        own = {row * 2, min(row * 2 + 1, indices.shape[-1] - 1)}
        for head in range(2):
            kept = indices[0, head, row, : counts[0, head, row]].tolist()
            assert own <= set(kept) or len(kept) == 1


def test_kinds_of_plans_differ():
    near = {}
    for plan in ("random", "video", "one dense head"):
        case = Case(16, 4096, 3, 0.25, plan=plan)
        counts, indices = make_plan(case, CPU)
        used = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
        distance = (indices - 2 * torch.arange(indices.shape[2])[:, None]).abs().float()
        near[plan] = distance[used].mean()
        dense = counts[0].eq(indices.shape[-1]).all(-1)
        assert dense.tolist() == [plan == "one dense head", False, False]
    assert near["video"] < 0.7 * near["random"]


def test_a_density_of_one_keeps_everything():
    counts, indices = make_plan(Case(16, 1000, 1, 1.0), CPU)
    assert bool((counts == indices.shape[-1]).all())


def test_inputs_have_the_memory_of_a_model():
    q, k, v = make_inputs(Case(16, 100, 3, 0.5), torch.float32, CPU)
    assert q.shape == k.shape == v.shape == (1, 3, 100, 16)
    assert q.transpose(1, 2).is_contiguous() and not torch.equal(q, k)


def test_names_are_unique():
    names = [case.name for case in list_cases()]
    assert len(names) == len(set(names)) > 20
    # the bars' own come first, should the time be over before the end
    assert names[0].startswith("D=128 N=32768 H=24 density=0.5")
