"""Which value a call reads, how long it is valid, and where it lies."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch

from dit_opt.program.slots import Key, Lives, Reduce, Slot, SlotRef
from dit_opt.runtime.slot_store import KEPT_STREAMS, CallKey, SlotStore

CPU, META = torch.device("cpu"), torch.device("meta")
CALL = CallKey(stream="thread", sizes=(), branch=0, step=0, epoch=(1, 0))


def make_slot(**fields):
    return Slot("test", **fields)


def other(**changes):
    return dataclasses.replace(CALL, **changes)


def weight():
    return torch.nn.Parameter(torch.zeros(2), requires_grad=False)


def value(number, shape=(2,)):
    return torch.full(shape, float(number))


class Kept:
    """A store with one slot at one place, for one owner."""

    def __init__(self, slot=None, **fields):
        self.store, self.owner = SlotStore(), weight()
        self.ref = SlotRef(slot or make_slot(**fields))

    def write(self, number, call=CALL, owner=None, **kwargs):
        owner = self.owner if owner is None else owner
        self.store.write(owner, self.ref, call, value(number, **kwargs))

    def find(self, call=CALL, owner=None):
        """The number that a call would read, or None."""
        entry = self.store.find(self.owner if owner is None else owner, self.ref, call)
        return None if entry is None else float(entry.value.flatten()[0])

    def read(self, call=CALL, device=CPU, shape=(2,)):
        return self.store.read(
            self.owner, self.ref, call, device, lambda: torch.empty(shape, device=device)
        )


@pytest.mark.parametrize(
    ("key", "change"),
    [
        (Key.STREAM, {"stream": "another thread"}),
        (Key.BRANCH, {"branch": 1}),
        (Key.STEP, {"step": 1}),
    ],
    ids=lambda x: x.value if isinstance(x, Key) else "",
)
def test_a_value_is_that_of_its_key_and_of_nothing_else(key, change):
    keyed, shared = (Kept(key=frozenset({Key.LAYER, *more})) for more in ((key,), ()))
    for kept in (keyed, shared):
        kept.write(7)
    assert keyed.find(other(**change)) is None and keyed.find() == 7
    assert shared.find(other(**change)) == 7
    keyed.write(8, other(**change))
    assert (keyed.find(), keyed.find(other(**change))) == (7, 8)


@pytest.mark.parametrize("key", [Key.LAYER, Key.PARAMETER])
def test_a_value_is_that_of_a_parameter_not_of_its_data(key):
    kept = Kept(key=frozenset({key}))
    kept.write(7)
    assert kept.find(owner=weight()) is None
    # as offloading does
    kept.owner.data = torch.ones(2)
    assert kept.find() == 7


def test_places_and_slots_are_told_apart():
    store, owner = SlotStore(), weight()
    refs = [SlotRef(Slot(name), place) for name in "ab" for place in (0, 1)]
    for number, ref in enumerate(refs):
        store.write(owner, ref, CALL, value(number))
    found = [store.find(owner, ref, CALL) for ref in refs]
    assert [float(entry.value[0]) for entry in found] == [0, 1, 2, 3]
    assert store.count_bytes() == {"a": 16, "b": 16}
    listed = {(slot.name, place): entry for _, (slot, place), _, entry in store}
    assert list(listed.values()) == found
    assert set(listed) == {("a", 0), ("a", 1), ("b", 0), ("b", 1)}


def test_values_go_with_their_parameter():
    kept = Kept()
    kept.write(7)
    kept.owner = weight()
    gc.collect()
    assert list(kept.store) == [] and kept.store.count_bytes() == {}


@pytest.mark.parametrize(
    ("lives", "valid"), [(Lives.RUN, False), (Lives.PROCESS, True), (Lives.WEIGHTS, True)]
)
def test_only_values_of_a_run_end_with_it(lives, valid):
    kept = Kept(lives=lives)
    kept.write(7)
    for epoch in ((2, 0), (1, 1)):
        assert (kept.find(other(epoch=epoch)) == 7) is valid
    assert kept.find() == 7


@pytest.mark.parametrize(
    ("lives", "valid"), [(Lives.RUN, True), (Lives.PROCESS, True), (Lives.WEIGHTS, False)]
)
def test_only_values_of_weights_end_when_these_change(lives, valid):
    kept = Kept(lives=lives)
    kept.write(7)
    with torch.no_grad():
        kept.owner.add_(1)
    assert (kept.find() == 7) is valid
    kept.write(8)
    assert kept.find() == 8


def test_a_parameter_of_inference_mode_has_no_version():
    with torch.inference_mode():
        kept = Kept(lives=Lives.WEIGHTS)
        kept.write(7)
        kept.owner.add_(1)
    assert kept.find() == 7


@pytest.mark.parametrize(
    ("reduce", "expected"), [(Reduce.REPLACE, 2), (Reduce.SUM, 10), (Reduce.MAX, 5)]
)
def test_a_write_adds_to_what_is_there(reduce, expected):
    kept = Kept(reduce=reduce)
    for number in (3, 5, 2):
        kept.write(number)
    assert kept.find() == expected
    (entry,) = (entry for *_, entry in kept.store)
    assert entry.writes == 3


@pytest.mark.parametrize("reduce", [Reduce.SUM, Reduce.MAX])
def test_what_is_not_valid_is_not_added_to(reduce):
    kept = Kept(reduce=reduce)
    kept.write(9)
    kept.write(2, other(epoch=(2, 0)))
    assert kept.find(other(epoch=(2, 0))) == 2
    # nor is a blank one, which nobody wrote
    kept = Kept(reduce=reduce, blank=9.0)
    kept.read()
    kept.write(2)
    assert kept.find() == 2


def raise_flag(kept, flag, call=CALL):
    kept.store.write(kept.owner, kept.ref, call, torch.tensor(flag))


def test_a_flag_is_raised_by_any_write_until_it_is_taken():
    kept = Kept(reduce=Reduce.FLAG, lives=Lives.PROCESS)
    take = lambda call=CALL: kept.store.take_flag(kept.owner, kept.ref, call)
    assert take() is False
    for flags, expected in (([False], False), ([True], True), ([True, False], True)):
        for flag in flags:
            raise_flag(kept, flag)
        assert take() is expected
        assert take() is False
    raise_flag(kept, True)
    assert take(other(branch=1)) is False and take() is True


def test_a_blank_value_is_made_where_none_is_valid():
    kept = Kept(blank=1.0)
    assert kept.read(shape=(2, 3)).tolist() == [[1.0] * 3] * 2
    # a blank value was not written
    assert kept.find() is None
    kept.write(7, shape=(2, 3))
    assert kept.read(shape=(2, 3)).tolist() == [[7.0] * 3] * 2
    assert kept.read(other(epoch=(2, 0)), shape=(2, 3)).tolist() == [[1.0] * 3] * 2


def test_without_a_blank_value_a_graph_may_not_read_before_a_write():
    kept = Kept()
    with pytest.raises(LookupError, match="Slot 'test' has no value for this call"):
        kept.read()
    kept.write(7)
    assert kept.read().tolist() == [7.0, 7.0]
    with pytest.raises(LookupError, match="no blank one"):
        kept.read(other(epoch=(2, 0)))


@pytest.mark.parametrize("reduce", [Reduce.REPLACE, Reduce.SUM, Reduce.MAX])
def test_a_value_keeps_its_address(reduce):
    """A CUDA graph knows what it reads by its address."""
    kept = Kept(reduce=reduce, blank=0.0)
    address = kept.read().data_ptr()
    for call in (CALL, CALL, other(epoch=(2, 0))):
        kept.write(5, call)
        assert kept.read(call).data_ptr() == address
    # blank again, in another run
    assert kept.read(other(epoch=(3, 0))).tolist() == [0.0, 0.0]
    assert kept.read(other(epoch=(3, 0))).data_ptr() == address


def test_a_written_value_is_a_copy():
    kept, given = Kept(), value(7)
    kept.store.write(kept.owner, kept.ref, CALL, given)
    given.zero_()
    assert kept.find() == 7


@pytest.mark.parametrize(
    "given", [value(3, shape=(4,)), torch.tensor([3, 3]), value(3).to(torch.float64)]
)
@pytest.mark.parametrize("reduce", [Reduce.REPLACE, Reduce.SUM])
def test_another_shape_or_dtype_begins_anew(reduce, given):
    kept = Kept(reduce=reduce)
    kept.write(7)
    kept.store.write(kept.owner, kept.ref, CALL, given)
    entry = kept.store.find(kept.owner, kept.ref, CALL)
    assert torch.equal(entry.value, given) and entry.value.dtype == given.dtype
    assert entry.writes == 1


def test_a_blank_value_of_another_shape_is_another_one():
    kept = Kept(blank=1.0)
    assert kept.read(shape=(2,)).shape == (2,)
    assert kept.read(shape=(5,)).tolist() == [1.0] * 5


def test_a_value_follows_a_model_that_was_moved():
    kept = Kept(blank=0.0)
    kept.write(7)
    moved = kept.read(device=META)
    assert moved.device == META and moved.shape == (2,)
    kept.store.write(kept.owner, kept.ref, CALL, value(8))
    assert kept.read().tolist() == [8.0, 8.0]


@pytest.mark.parametrize("reduce", list(Reduce))
def test_what_inference_mode_wrote_can_be_written_elsewhere(reduce):
    kept = Kept(reduce=reduce, lives=Lives.PROCESS)
    with torch.inference_mode():
        kept.store.write(kept.owner, kept.ref, CALL, torch.tensor([True, False]))
    kept.store.write(kept.owner, kept.ref, CALL, torch.tensor([True, False]))
    entry = kept.store.find(kept.owner, kept.ref, CALL)
    assert entry.writes == 2 and not entry.value.is_inference()
    with torch.inference_mode():
        kept.store.write(kept.owner, kept.ref, CALL, torch.tensor([True, False]))
    assert entry.writes == 3


def test_what_was_used_last_is_kept():
    kept = Kept(key=frozenset({Key.LAYER, Key.STREAM}))
    for number in range(KEPT_STREAMS):
        kept.write(number, other(stream=number))
    assert kept.find(other(stream=0)) == 0
    kept.write(KEPT_STREAMS, other(stream=KEPT_STREAMS))
    # read a moment ago, so the next oldest went
    assert kept.find(other(stream=0)) == 0 and kept.find(other(stream=1)) is None
    assert len(list(kept.store)) == KEPT_STREAMS


def test_a_stream_is_kept_or_forgotten_with_all_of_its_slots():
    store, owner = SlotStore(), weight()
    refs = [SlotRef(make_slot(), place) for place in range(2)]
    for number in range(KEPT_STREAMS + 3):
        for ref in refs:
            store.write(owner, ref, other(stream=number), value(number))
    assert len(list(store)) == 2 * KEPT_STREAMS
    # one that goes on reading a single slot keeps the others, too
    for number in range(100, 100 + KEPT_STREAMS):
        assert store.find(owner, refs[0], other(stream=10)) is not None
        store.write(owner, refs[0], other(stream=number), value(number))
    assert store.find(owner, refs[1], other(stream=10)) is not None
    assert store.find(owner, refs[1], other(stream=11)) is None


def test_the_steps_of_a_run_do_not_count_as_streams():
    kept = Kept(key=frozenset({Key.LAYER, Key.BRANCH, Key.STREAM, Key.STEP}), lives=Lives.PROCESS)
    steps = range(2 * KEPT_STREAMS)
    for step in steps:
        kept.write(step, other(step=step))
    assert all(kept.find(other(step=step)) == step for step in steps)
