import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from convnext_kernels.tuning import GPUS, cache, cpus, for_device

H100, A100 = GPUS["H100"], GPUS["A100"]
PROBLEM = (8, 96, 56, 56, torch.bfloat16)


@pytest.mark.parametrize(
    ("batch", "same"), [(5, True), (8, True), (4, False), (9, False), (0, False), (1, False), (2**33, False)]
)
def test_batches_share_a_class_up_to_a_power_of_two(batch, same):
    assert (cache.shape_class((batch, *PROBLEM[1:])) == cache.shape_class(PROBLEM)) == same


def test_keys_tell_apart_all_that_a_time_depends_on(monkeypatch):
    keys = {
        cache.key("mlp", PROBLEM, H100),
        cache.key("dwconv", PROBLEM, H100),
        cache.key("mlp", PROBLEM, A100),
        cache.key("mlp", (*PROBLEM[:4], torch.float16), H100),
        cache.key("mlp", (8, 96, 56, 28, torch.bfloat16), H100),
        cache.key("mlp", PROBLEM, for_device("NVIDIA H100 PCIe", 90)),  # of the same data sheet
        *(cache.key("mlp", PROBLEM, cpus.machine(*c)) for c in (("avx2", 2), ("avx2", 4), ("avx512", 2))),
    }
    monkeypatch.setattr(cache, "__version__", "99.0")
    keys.add(cache.key("mlp", PROBLEM, H100))
    for package in ("torch", "triton"):
        version = cache._version
        monkeypatch.setattr(cache, "_version", lambda name, p=package, v=version: "99.0" if name == p else v(name))
        keys.add(cache.key("mlp", PROBLEM, H100))
    assert len(keys) == 12


def test_another_version_finds_nothing_and_keeps_what_was_there(file, monkeypatch, remember):
    remember("mlp", PROBLEM, H100, "fused")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "__version__", "99.0")
        assert cache.lookup("mlp", PROBLEM, H100) is None
        remember("mlp", PROBLEM, H100, "two kernels")
    cache.forget()
    assert cache.lookup("mlp", PROBLEM, H100) == "fused"
    assert cache.size() == 2


DAMAGED = {
    "empty": "",
    "cut off": '{"format": 2, "entries": {"a": "b"',
    "entries of another kind": '{"format": 2, "entries": {"a": 3}}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_rebuilt_with_one_warning(file, caplog, content, remember):
    file.parent.mkdir()
    file.write_text(content)
    with caplog.at_level(logging.WARNING, "convnext_kernels"):
        assert cache.lookup("mlp", PROBLEM, H100) is None
        cache.forget()
        assert cache.lookup("mlp", PROBLEM, H100) is None
        remember("mlp", PROBLEM, H100, "fused")
    assert len(caplog.records) == 1
    assert "damaged" in caplog.text
    cache.forget()
    assert cache.lookup("mlp", PROBLEM, H100) == "fused"


def test_a_write_that_fails_leaves_the_old_file(file, monkeypatch, remember):
    remember("mlp", PROBLEM, H100, "fused")
    before = file.read_text()

    def replace(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    remember("mlp", PROBLEM, A100, "two kernels")
    assert file.read_text() == before
    assert list(file.parent.glob("*.tmp")) == []


WRITER = """
import sys
from convnext_kernels.tuning import GPUS, cache
for i in range(25):
    cache.keep({cache.key("mlp", (1, sys.argv[1], i), GPUS["H100"]): "fused"})
"""


def test_two_processes_lose_nothing(file):
    other, own = subprocess.Popen([sys.executable, "-c", WRITER, "a"]), 0
    while other.poll() is None:
        if file.exists():
            json.loads(file.read_text())  # whole at every moment
            cache.keep({cache.key("mlp", (1, "b", own), H100): "fused"})
            own += 1
    assert other.returncode == 0
    cache.forget()
    assert own > 0
    assert cache.size() == 25 + own
