"""Memory that is used again and again by the processor paths."""

from __future__ import annotations

import platform
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dit_opt.kernels import scratch
from dit_opt.kernels.scratch import Scratch


def test_memory_is_used_again_by_name_and_dtype():
    memory = Scratch()
    first = memory.take("scores", torch.float32, 3, 4)
    assert first.shape == (3, 4)
    assert memory.take("scores", torch.float32, 2, 5).data_ptr() == first.data_ptr()
    others = [memory.take("keys", torch.float32, 3), memory.take("scores", torch.bfloat16, 3)]
    assert first.data_ptr() not in {x.data_ptr() for x in others}
    assert memory.take("scores", torch.float32, 100).numel() == 100


def test_a_shape_is_remembered_while_its_memory_is(monkeypatch):
    memory = Scratch()
    small, other = memory.take("scores", torch.float32, 3), memory.take("keys", torch.float32, 3)
    assert memory.take("scores", torch.float32, 3) is small
    memory.take("scores", torch.float32, 4)
    assert memory.take("scores", torch.float32, 3).data_ptr() != small.data_ptr()
    assert memory.take("keys", torch.float32, 3) is other
    monkeypatch.setattr(scratch, "KEPT_VIEWS", 1)
    memory.trim()
    again = memory.take("keys", torch.float32, 3)
    assert again is not other and again.data_ptr() == other.data_ptr()


def test_memory_of_inference_mode_can_be_written_to_outside():
    memory = Scratch()
    with torch.inference_mode():
        inner = memory.take("scores", torch.float32, 8).fill_(1)
        memory.take("scores", torch.float32, 4)
    assert memory.take("scores", torch.float32, 4).fill_(1).sum() == 4
    assert memory.take("scores", torch.float32, 8).data_ptr() == inner.data_ptr()
    assert memory.take("scores", torch.float32, 8).fill_(2).sum() == 16


def test_threads_share_nothing():
    memory = Scratch()
    own = memory.take("scores", torch.float32, 8)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(memory.take, "scores", torch.float32, 8).result()
    assert own.data_ptr() != other.data_ptr()


def test_large_memory_is_given_back(monkeypatch):
    monkeypatch.setattr(scratch, "KEPT_BYTES", 40)
    memory = Scratch()
    small = memory.take("small", torch.float32, 10)
    memory.take("large", torch.float32, 11)
    large = weakref.ref(memory.take("large", torch.float32, 11))
    memory.trim()
    assert large() is None
    assert list(memory.buffers) == [("small", torch.float32)]
    assert memory.take("small", torch.float32, 10).data_ptr() == small.data_ptr()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how glibc keeps memory")
def test_steps_find_the_memory_that_the_last_one_freed():
    code = """
import resource
import torch
from dit_opt.kernels.scratch import keep_heap

def count_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def measure_step():
    for _ in range(3):
        first = count_faults()
        held = [torch.zeros(n << 20, dtype=torch.uint8) for n in (10, 9, 9, 9, 9)]
        del held
    return count_faults() - first

before = measure_step()
keep_heap()
print(before, measure_step())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    before, after = map(int, done.stdout.split())
    assert before > 1000 and after < 200
