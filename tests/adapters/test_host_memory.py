"""The memory that a process may still take, in containers of both kinds, made of files, and on this machine."""

from pathlib import Path

import pytest

from loractl.adapters.host_memory import free_memory

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 8 GiB free."""
    _write(tmp_path / "proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    return tmp_path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _group(folder: Path, *, version: int, limit: str, usage_mib: int, cache_mib: int = 0) -> None:
    names = {1: ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), 2: ("max", "current", "inactive_file")}
    limit_name, usage_name, cache_name = names[version]
    _write(folder / f"memory.{limit_name}", f"{limit}\n")
    _write(folder / f"memory.{usage_name}", f"{usage_mib * MIB}\n")
    _write(folder / "memory.stat", f"anon 1\n{cache_name} {cache_mib * MIB}\n")


def test_machine_counts_where_no_group_limits(root: Path) -> None:
    assert free_memory(root).size_bytes == 8192 * MIB
    _write(root / "proc/self/cgroup", "0::/\n")
    _group(root / "sys/fs/cgroup", version=2, limit="max", usage_mib=100)
    free = free_memory(root)
    assert (free.size_bytes, free.limit) == (8192 * MIB, "the machine's free memory")


def test_container_of_v2_leaves_its_limit_less_use_with_cache_given_back(root: Path) -> None:
    _write(root / "proc/self/cgroup", "0::/\n")
    _group(root / "sys/fs/cgroup", version=2, limit=str(2048 * MIB), usage_mib=900, cache_mib=400)
    free = free_memory(root)
    assert free.size_bytes == (2048 - 500) * MIB
    assert free.limit == "the container's memory.max of 2 GiB"


def test_container_of_v1_is_found_when_its_path_is_the_hosts(root: Path) -> None:
    _write(root / "proc/self/cgroup", "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc\n")
    _group(root / "sys/fs/cgroup/memory", version=1, limit=str(1024 * MIB), usage_mib=300, cache_mib=100)
    free = free_memory(root)
    assert free.size_bytes == (1024 - 200) * MIB
    assert "memory.limit_in_bytes" in free.limit


@pytest.mark.parametrize(("version", "mount"), [(1, "sys/fs/cgroup/memory"), (2, "sys/fs/cgroup")])
def test_tightest_of_nested_groups_counts_and_a_group_over_its_limit_leaves_nothing(
    root: Path, version: int, mount: str
) -> None:
    _write(root / "proc/self/cgroup", f"4:{'memory' if version == 1 else ''}:/pods/one\n")
    _group(root / mount / "pods/one", version=version, limit=str(4096 * MIB), usage_mib=10)
    _group(root / mount / "pods", version=version, limit=str(1024 * MIB), usage_mib=600)
    assert free_memory(root).size_bytes == 424 * MIB
    _group(root / mount / "pods", version=version, limit=str(1024 * MIB), usage_mib=1100)
    assert free_memory(root).size_bytes == 0


def test_v1_without_a_limit_says_a_huge_number_and_the_machine_counts(root: Path) -> None:
    _write(root / "proc/self/cgroup", "4:memory:/\n")
    _group(root / "sys/fs/cgroup/memory", version=1, limit="9223372036854771712", usage_mib=300)
    assert free_memory(root).limit == "the machine's free memory"


def test_this_machine_leaves_something_and_no_more_than_it_has() -> None:
    whole = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < free_memory().size_bytes <= int(whole.split()[1]) * 1024
