"""Are the cores counted that a process may use, and not all that it sees?"""

import os
from pathlib import Path

import pytest

from lightning_diloco.reporting.cores import usable_cores


@pytest.fixture(autouse=True)
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores that the process is bound to."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """``proc`` and ``sys`` with these files, whose content ends with a newline, as the kernel writes it."""
    for path, content in {"proc/self/cgroup": groups, **files}.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    return root


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/cpu"
NESTED = "0::/machine.slice/pod/box"
OLD = "5:memory:/elsewhere\n4:cpuset:/a\n3:cpu,cpuacct:/a/b\n0::/"


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/", {f"{V2}/cpu.max": "max 100000"}, 16),
        ("0::/", {f"{V2}/cpu.max": "200000 100000"}, 2),
        ("0::/", {f"{V2}/cpu.max": "350000 100000"}, 3),  # the fourth would wait half of the time
        ("0::/", {f"{V2}/cpu.max": "50000 100000"}, 1),
        ("0::/", {f"{V2}/cpu.max": "3200000 100000"}, 16),  # more than it is bound to
        ("0::/", {}, 16),  # the machine's own top has no such file
        (NESTED, {f"{V2}/machine.slice/pod/box/cpu.max": "400000 100000"}, 4),
        (NESTED, {f"{V2}/machine.slice/cpu.max": "500000 100000", f"{V2}/machine.slice/pod/cpu.max": "max 100000"}, 5),
        (NESTED, {f"{V2}/cpu.max": "600000 100000"}, 6),  # a container that sees its group at the top
        (NESTED, {f"{V2}/machine.slice/other/cpu.max": "100000 100000", "sys/fs/cpu.max": "100000 100000"}, 16),
        # the strictest of several
        (NESTED, {f"{V2}/machine.slice/pod/box/cpu.max": "400000 100000", f"{V2}/cpu.max": "200000 100000"}, 2),
        (NESTED, {f"{V2}/machine.slice/pod/box/cpu.max": "200000 100000", f"{V2}/cpu.max": "400000 100000"}, 2),
        (OLD, {f"{V1}/a/b/cpu.cfs_quota_us": "-1", f"{V1}/a/b/cpu.cfs_period_us": "100000"}, 16),
        (OLD, {f"{V1}/a/b/cpu.cfs_quota_us": "100000", f"{V1}/a/b/cpu.cfs_period_us": "50000"}, 2),
        (OLD, {f"{V1}/cpu.cfs_quota_us": "300000", f"{V1}/cpu.cfs_period_us": "100000"}, 3),
        (OLD, {f"{V1}/elsewhere/cpu.cfs_quota_us": "1", f"{V1}/elsewhere/cpu.cfs_period_us": "1"}, 16),
        ("4:cpuset:/a", {f"{V1}/a/cpu.cfs_quota_us": "1", f"{V1}/a/cpu.cfs_period_us": "1"}, 16),
        (OLD, {f"{V1}/a/b/cpu.cfs_quota_us": "100000"}, 16),
        ("0::/a:b", {f"{V2}/a:b/cpu.max": "200000 100000"}, 2),
        ("0::/a..b", {f"{V2}/a..b/cpu.max": "200000 100000"}, 2),
        # entered from outside: the process is in none of the groups that it sees
        ("0::/../../foo", {f"{V2}/cpu.max": "200000 100000", "sys/foo/cpu.max": "200000 100000"}, 16),
    ],
)
def test_quotas_of_control_groups(groups: str, files: dict[str, str], cores: int, tmp_path: Path) -> None:
    assert usable_cores(system(tmp_path, groups, files)) == cores


@pytest.mark.parametrize("content", ["", "100000", "100000 0", "0 100000", "foo bar", "1 2 3"])
def test_what_is_no_quota_counts_as_none_and_hides_no_other(content: str, tmp_path: Path) -> None:
    files = {f"{V2}/a/b/cpu.max": content, f"{V2}/a/cpu.max": "300000 100000"}
    assert usable_cores(system(tmp_path, "0::/a/b", files)) == 3


@pytest.mark.parametrize("groups", ["", "nonsense", "0:", "7::/a", "0:memory:/a", "\n\n0::/a\x0b\u2028"])
def test_odd_lines_are_no_groups(groups: str, tmp_path: Path) -> None:
    assert usable_cores(system(tmp_path, groups, {f"{V2}/a/cpu.max": "100000 100000"})) == 16


def test_what_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    """A folder in the place of a file, and bytes that are no text: both raise, whoever asks."""
    (tmp_path / V2 / "a/cpu.max").mkdir(parents=True)
    assert usable_cores(system(tmp_path, "0::/a", {f"{V2}/cpu.max": "500000 100000"})) == 5
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::/\xff\n")
    assert usable_cores(tmp_path) == 16
    (tmp_path / "proc/self/cgroup").unlink()
    (tmp_path / "proc/self/cgroup").mkdir()
    assert usable_cores(tmp_path) == 16


def test_where_there_are_no_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores(tmp_path) == 16
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cores(tmp_path) == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path) == 1


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
