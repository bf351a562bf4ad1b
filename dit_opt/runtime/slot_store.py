"""Where the values of slots are kept between calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from dit_opt.program.slots import Key, Lives, Reduce, Slot, SlotRef

# Streams of calls (threads, sizes, branches) whose values are kept, of each layer.
KEPT_STREAMS = 64

_lock = threading.Lock()


def remember(entries: dict[Any, Any], key: Hashable, value: Any) -> None:
    """Put an entry last, and forget those that were put longest ago."""
    with _lock:
        entries.pop(key, None)
        entries[key] = value
        while len(entries) > KEPT_STREAMS:
            del entries[next(iter(entries))]


@dataclass(frozen=True)
class CallKey:
    """What tells one call from another.

    Attributes:
        stream: the thread and the sizes of the call. sizes: the sizes alone.
        branch, step: in its run.
        epoch: what values of the lifetime RUN must share with a call to be valid in it.
    """

    stream: Hashable
    sizes: tuple[int, ...]
    branch: int
    step: int
    epoch: Hashable


@dataclass
class Entry:
    """The value of a slot for one key.

    Attributes:
        value: the tensor; it keeps its address while its shape and device stay.
        epoch: of the call that wrote it; None where nobody did, and it is blank.
        version: of the parameter that it belongs to, when it was written.
        writes: how often it was written.
    """

    value: torch.Tensor
    epoch: Hashable = None
    version: int | None = None
    writes: int = 0


class SlotStore:
    """The values of all slots that one compiled graph reads and writes.

    By the parameter that identifies a layer or a model, which is held weakly; then by stream and
    branch, of which those that were used last are kept, each with all of its slots; then by slot,
    place and step.
    """

    def __init__(self) -> None:
        self._by_owner: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def find(self, owner: torch.Tensor, ref: SlotRef, call: CallKey) -> Entry | None:
        """The valid entry that a call would read; it is the last one used from now on."""
        entries, key = self._locate(owner, ref, call)
        entry = entries.get(key)
        if entry is None or not _is_valid(ref.slot, entry, owner, call):
            return None
        return entry

    def read(
        self,
        owner: torch.Tensor,
        ref: SlotRef,
        call: CallKey,
        device: torch.device,
        make: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """The value for a call, on a device; `make` makes a blank one where none is valid.

        Raises LookupError where none is and the slot has no blank: the graph may not run yet.
        """
        entry = self.find(owner, ref, call)
        if entry is None:
            return self._fill(owner, ref, call, make)
        # follows a model that was moved between calls
        if entry.value.device != device:
            with torch.inference_mode(False):
                entry.value = entry.value.to(device)
        return entry.value

    def write(self, owner: torch.Tensor, ref: SlotRef, call: CallKey, value: torch.Tensor) -> None:
        """Keep what a graph returned. Copies: a CUDA graph reuses the memory of its outputs."""
        entries, key = self._locate(owner, ref, call, is_written=True)
        entry = entries.get(key)
        if entry is None or not _is_writable(entry.value, value):
            entry = Entry(_keep(value))
        elif ref.slot.reduce is Reduce.REPLACE or not _is_valid(ref.slot, entry, owner, call):
            entry.value.copy_(value)
        else:
            _combine(ref.slot.reduce, entry.value, value)
        entry.epoch, entry.version = call.epoch, _read_version(ref.slot, owner)
        entry.writes += 1
        entries[key] = entry

    def take_flag(self, owner: torch.Tensor, ref: SlotRef, call: CallKey) -> bool:
        """Whether a FLAG was raised since it was taken last. Waits for the device."""
        entries, key = self._locate(owner, ref, call)
        entry = entries.pop(key, None)
        return entry is not None and bool(entry.value)

    def count_bytes(self, owners: Container[int] | None = None) -> dict[str, int]:
        """Memory by slot name; of the parameters with these ids, where they are given."""
        found: dict[str, int] = {}
        for owner, (slot, _), _, entry in self:
            if owners is not None and id(owner) not in owners:
                continue
            found[slot.name] = found.get(slot.name, 0) + entry.value.nbytes
        return found

    def __iter__(self) -> Iterator[tuple[torch.Tensor, tuple[Slot, int], tuple[Any, ...], Entry]]:
        """(owner, (slot, place), rest of the key, entry) of all that is kept."""
        for owner, groups in list(self._by_owner.items()):
            for (stream, branch), entries in list(groups.items()):
                for (slot, place, step), entry in list(entries.items()):
                    yield owner, (slot, place), (stream, branch, step), entry

    def _locate(
        self, owner: torch.Tensor, ref: SlotRef, call: CallKey, is_written: bool = False
    ) -> tuple[dict[tuple[Any, ...], Entry], tuple[Any, ...]]:
        """The entries of a call's stream and branch, which are now the last ones used, and the key
        of a slot among them. What is not in the slot's key is None.
        """
        groups: Any = self._by_owner.setdefault(owner, {})
        whole = {Key.STREAM: call.stream, Key.BRANCH: call.branch, Key.STEP: call.step}
        *group, step = (value if kind in ref.slot.key else None for kind, value in whole.items())
        entries = groups.get(tuple(group), {})
        if entries or is_written:
            remember(groups, tuple(group), entries)
        return entries, (ref.slot, ref.place, step)

    def _fill(
        self,
        owner: torch.Tensor,
        ref: SlotRef,
        call: CallKey,
        make: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """A blank value, at the address of an invalid one where that has its shape."""
        blank = ref.slot.blank
        if blank is None:
            raise LookupError(
                f"Slot {ref.slot.name!r} has no value for this call and no blank one; a graph that "
                "reads it may run only after one that writes it."
            )
        entries, key = self._locate(owner, ref, call, is_written=True)
        entry, fresh = entries.get(key), make()
        if entry is None or not _is_writable(entry.value, fresh):
            entry = Entry(fresh)
        entry.value.fill_(blank)
        entry.epoch = None
        entries[key] = entry
        return entry.value


def _is_valid(slot: Slot, entry: Entry, owner: torch.Tensor, call: CallKey) -> bool:
    if not entry.writes or entry.epoch is None:
        return False
    if slot.lives is Lives.RUN:
        return entry.epoch == call.epoch
    return slot.lives is Lives.PROCESS or entry.version == _read_version(slot, owner)


def _read_version(slot: Slot, owner: torch.Tensor) -> int | None:
    if slot.lives is not Lives.WEIGHTS or owner.is_inference():
        return None
    return owner._version


def _is_writable(kept: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a value can take the place of a kept one, at its address."""
    return (kept.device, kept.dtype, kept.shape) == (value.device, value.dtype, value.shape)


def _keep(value: torch.Tensor) -> torch.Tensor:
    """A copy that may be written to in every mode of autograd."""
    with torch.inference_mode(False), torch.no_grad():
        return value.clone()


def _combine(reduce: Reduce, kept: torch.Tensor, value: torch.Tensor) -> None:
    if reduce is Reduce.SUM:
        kept.add_(value)
    elif reduce is Reduce.MAX:
        torch.maximum(kept, value, out=kept)
    else:
        kept.logical_or_(value)
