"""The list of routers, and what each says of itself."""

from __future__ import annotations

import pytest
import sympy
import torch

from dit_opt.kernels.plan.orders import VideoLayout
from dit_opt.kernels.searches.headwise.head_orders import ORDER_NAMES
from dit_opt.options import OptionError, Options, list_routers
from dit_opt.policy import cost
from dit_opt.program.slots import Lives
from dit_opt.routers import AUTO, KEEP_ALL, ROUTERS, find_router
from dit_opt.routers.base import Goal

SIZES = (3, 4, 5, 0, 60)
LAYOUT = VideoLayout(*SIZES)
each_router = pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.name)


def test_names_find_routers():
    assert all(find_router(router.name) is router for router in ROUTERS)
    assert find_router("auto") is find_router(AUTO)
    assert find_router(KEEP_ALL.name) is KEEP_ALL
    names = [router.name for router in (*ROUTERS, KEEP_ALL)]
    assert len(set(names)) == len(names)
    with pytest.raises(LookupError, match=r"No router is called 'headwize'.*'headwise'"):
        find_router("headwize")


def test_options_take_the_routers_of_the_list():
    assert list_routers() == ("auto", "dense", *(router.name for router in ROUTERS))
    with pytest.raises(OptionError, match="'router' is 'keep_all'"):
        Options(router=KEEP_ALL.name)


@each_router
def test_state_that_is_restored_lives_as_long_as_a_run(router):
    assert router.searches and router.slots
    # the oracle is one more search of another router
    owner = "headwise" if router.name == "oracle" else router.name
    assert all(slot.name.startswith(f"{owner}.") for slot in router.slots)
    assert {slot.lives for slot in router.slots} == {Lives.RUN}
    # one variant that searches as it is told reads the plan before there is one
    assert not router.switchable or all(slot.blank is not None for slot in router.slots)


@each_router
def test_a_search_scores_no_more_than_every_pair(router):
    pairs = router.count_pairs(cost.TOKENS)
    assert all(0 <= float(sympy.sympify(pairs).subs(cost.TOKENS, n)) <= n * n for n in (64, 4096))


def test_what_needs_no_search_costs_none():
    assert KEEP_ALL.count_pairs(cost.TOKENS) == 0 and not KEEP_ALL.slots
    assert find_router("frame_tile").count_pairs(cost.TOKENS) == 0


@each_router
def test_tables_are_made_for_a_layout(router):
    tables = router.make_tables(LAYOUT, Goal(0.5, True), torch.device("cpu"))
    assert tables and all(table is not None for table in tables)


def test_heads_have_names():
    choice = {"rainfusion.choice": torch.tensor([[-1, -1]])}
    assert find_router("rainfusion").name_heads(SIZES, choice) == ["dense", "dense"]
    order = {"headwise.words": torch.empty(0), "headwise.order": torch.tensor([[2, 0]])}
    for name in ("headwise", "oracle"):
        assert find_router(name).name_heads(SIZES, order) == [ORDER_NAMES[2], ORDER_NAMES[0]]
    assert [ORDER_NAMES[2], ORDER_NAMES[0]] == ["cubes", "raster"]
    assert find_router("subblock").name_heads(SIZES, order) is None
