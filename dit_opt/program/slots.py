"""Slots: tensors that outlive a call, and how a graph reads and writes them.

State goes through the signature of a graph: what is read is an appended placeholder, what is
written an appended output. No op hides any, so CUDA graphs, caches and reordering stay correct.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node


class Key(enum.Enum):
    """What tells the values of a slot apart.

    LAYER and PARAMETER are the identity of a live `nn.Parameter`: it survives offloading, and one
    compiled block serves all layers under regional compilation. BRANCH is the guidance branch,
    STREAM the thread and the sizes of a call, STEP the step of the run.
    """

    LAYER = "layer"
    PARAMETER = "parameter"
    BRANCH = "branch"
    STREAM = "stream"
    STEP = "step"


class Lives(enum.Enum):
    """How long a value is valid.

    RUN: until another denoising run begins. PROCESS: until a reset. WEIGHTS: until the parameter
    that it belongs to changes (by its version counter).
    """

    RUN = "run"
    PROCESS = "process"
    WEIGHTS = "weights"


class Reduce(enum.Enum):
    """What a write does with the value that is there. FLAG is true until it is taken."""

    REPLACE = "replace"
    SUM = "sum"
    MAX = "max"
    FLAG = "flag"


@dataclass(frozen=True)
class Slot:
    """A kind of state: one tensor for each value of its key.

    Attributes:
        name: as "headwise.words"; shown in dumps and reports.
        key: what tells its values apart.
        lives: how long a value is valid. reduce: what a write does.
        blank: number that fills what is read where no valid value is there; None where a graph
            that reads the slot may only run after a write.
    """

    name: str
    key: frozenset[Key] = frozenset({Key.LAYER, Key.BRANCH, Key.STREAM})
    lives: Lives = Lives.RUN
    reduce: Reduce = Reduce.REPLACE
    blank: float | None = None


@dataclass(frozen=True)
class SlotRef:
    """A slot at one place of a graph.

    Attributes:
        place: tells the sites of one layer apart.
        anchor: position of the placeholder whose parameter is the key's LAYER or PARAMETER; None
            for the parameter that identifies the model.
    """

    slot: Slot
    place: int = 0
    anchor: int | None = None


@dataclass(frozen=True)
class SlotRead:
    """An appended placeholder: `node` is fed with the value of `ref`."""

    ref: SlotRef
    node: Node

    @property
    def example(self) -> torch.Tensor:
        """Shape, dtype and device of the value; sizes may be symbolic."""
        return self.node.meta["example_value"]


@dataclass(frozen=True)
class SlotWrite:
    """An appended output, which goes to `ref`.

    `modes` are those whose calls write it, by value; empty for all. (One variant may serve two
    modes.)
    """

    ref: SlotRef
    node: Node
    modes: frozenset[Any] = frozenset()
