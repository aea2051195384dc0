from collections import namedtuple

import psutil
import pytest

from convnext_kernels.bench import conditions
from convnext_kernels.bench.conditions import Course

Cpu = namedtuple("Cpu", "user system idle iowait steal guest")


def test_other_processes_and_the_hypervisor(monkeypatch):
    """A second on four CPUs, of which this process used one and a half."""
    times = iter([Cpu(0, 0, 0, 0, 0, 0), Cpu(2.3, 0.2, 1.3, 0.0, 0.2, 0.0)])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(times))
    own = iter([10.0, 11.5])
    monkeypatch.setattr(conditions.time, "process_time", lambda: next(own))
    course = Course()
    with course.watch():
        pass
    assert course.shares() == pytest.approx({"others": 0.25, "steal": 0.05})
    others, steal = course.warnings()
    assert "other processes used 25%" in others
    assert "hypervisor gave 5%" in steal
