"""The processors that a process may keep busy, in containers of both kinds, made of files, and on this machine."""

import os
from pathlib import Path

import pytest
import torch

from loractl.adapters import host_processors
from loractl.adapters.host_processors import keep_threads_to_processors, usable_processors


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 processors, its control groups to be written."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    return tmp_path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_machine_counts_where_no_group_limits(root: Path) -> None:
    assert usable_processors(root) == 64
    _write(root / "proc/self/cgroup", "0::/\n")
    _write(root / "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert usable_processors(root) == 64


@pytest.mark.parametrize(("quota", "usable"), [(400_000, 4), (250_000, 2), (50_000, 1)])
def test_container_of_v2_may_use_its_whole_processors_and_at_least_one(root: Path, quota: int, usable: int) -> None:
    _write(root / "proc/self/cgroup", "0::/\n")
    _write(root / "sys/fs/cgroup/cpu.max", f"{quota} 100000\n")
    assert usable_processors(root) == usable


def test_container_of_v1_is_found_when_its_path_is_the_hosts(root: Path) -> None:
    _write(root / "proc/self/cgroup", "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n")
    _write(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "300000\n")
    _write(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert usable_processors(root) == 3
    _write(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    assert usable_processors(root) == 64


def test_tightest_of_nested_groups_counts(root: Path) -> None:
    _write(root / "proc/self/cgroup", "0::/pods/one\n")
    _write(root / "sys/fs/cgroup/pods/one/cpu.max", "800000 100000\n")
    _write(root / "sys/fs/cgroup/pods/cpu.max", "200000 100000\n")
    assert usable_processors(root) == 2


def test_torch_computes_on_no_more_threads_unless_the_operator_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(host_processors, "usable_processors", lambda: 1)
    try:
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        keep_threads_to_processors()
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        keep_threads_to_processors()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
