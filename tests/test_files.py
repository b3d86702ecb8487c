"""Are checkpoint files whole, on every file system, and does nothing else stay or get in the way?"""

import errno
import io
import os
import pickle
import signal
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Net, assert_same, copy_of, loader, trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from lightning_diloco import DilocoStrategy
from lightning_diloco._lightning import io as diloco_io
from lightning_diloco._lightning.io import AtomicCheckpointIO

LARGE = {"x": torch.arange(200_000.0)}


def leftover(folder: Any = ".") -> str:
    """What a process leaves that is killed just before its file is complete."""
    child = os.fork()
    if child == 0:
        os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        AtomicCheckpointIO().save_checkpoint(LARGE, Path(folder) / "hpc_ckpt_2.ckpt")
    os.waitpid(child, 0)
    (name,) = [n for n in os.listdir(folder) if n.endswith(".part")]
    return name


def raising(number: int, only: Any = lambda *_: True, function: Any = None) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if only(*args):
            raise OSError(number, os.strerror(number))
        return function(*args, **kwargs)

    return call


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_no_scan_of_lightnings_finds_a_file_under_way(tmp_path: Path) -> None:
    strategy = DilocoStrategy(num_nodes=3, diloco_interval=4)
    t = trainer(strategy, max_steps=3, default_root_dir=tmp_path)
    t.fit(Net(), loader())
    t.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    t.save_checkpoint(tmp_path / "last.ckpt")
    assert len(leftover()) < 40
    assert _CheckpointConnector.hpc_save_path(str(tmp_path)).endswith("hpc_ckpt_2.ckpt")
    found = ModelCheckpoint(tmp_path)._find_last_checkpoints(t)
    assert found == {str(tmp_path / "last.ckpt")}
    for name in ("hpc", "last"):
        again = trainer(
            DilocoStrategy(num_nodes=3, diloco_interval=4),
            max_steps=5,
            default_root_dir=tmp_path,
            enable_checkpointing=True,
            callbacks=[ModelCheckpoint(tmp_path, save_last=True)],
        )
        again.fit(Net(), loader(), ckpt_path=name)
        assert again.global_step == 5


def test_the_next_save_removes_leftovers_but_no_file_that_somebody_writes(tmp_path: Path, monkeypatch: Any) -> None:
    io = AtomicCheckpointIO()
    leftover()
    began, go_on = threading.Event(), threading.Event()
    fsync = os.fsync

    def waits(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            began.set()
            assert go_on.wait(60)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", waits)
    thread = threading.Thread(target=io.save_checkpoint, args=(LARGE, tmp_path / "slow.ckpt"))
    thread.start()
    assert began.wait(60)
    io.save_checkpoint({"x": 1}, tmp_path / "quick.ckpt")
    assert len([n for n in os.listdir() if n.endswith(".part")]) == 1, "the slow one's; the leftover is gone"
    go_on.set()
    thread.join()
    assert sorted(os.listdir()) == ["quick.ckpt", "slow.ckpt"]
    assert torch.equal(torch.load("slow.ckpt")["x"], LARGE["x"])


def test_a_file_under_way_of_another_process_is_left_alone() -> None:
    begun, go_on = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        fsync = os.fsync

        def waits(descriptor: int) -> None:
            os.write(begun[1], b"x")
            os.read(go_on[0], 1)
            fsync(descriptor)

        os.fsync = waits
        try:
            AtomicCheckpointIO().save_checkpoint(LARGE, "slow.ckpt")
        finally:
            os._exit(0)
    os.read(begun[0], 1)
    AtomicCheckpointIO().save_checkpoint({"x": 1}, "quick.ckpt")
    os.write(go_on[1], b"xx")
    os.waitpid(child, 0)
    assert sorted(os.listdir()) == ["quick.ckpt", "slow.ckpt"]


def test_files_under_way_of_other_machines_are_leftovers_after_an_hour() -> None:
    there = ".diloco-00000000-0123456789ab.part"
    for age, stays in ((10, True), (4000, False)):
        Path(there).write_text("half")
        os.utime(there, (time.time() - age,) * 2)
        AtomicCheckpointIO().save_checkpoint({"x": 1}, "x.ckpt")
        assert Path(there).exists() == stays


def test_without_locks_a_file_is_a_leftover_after_an_hour(monkeypatch: Any) -> None:
    monkeypatch.setattr(diloco_io.fcntl, "flock", raising(errno.ENOTSUP))
    name = leftover()
    AtomicCheckpointIO().save_checkpoint({"x": 1}, "x.ckpt")
    assert sorted(os.listdir()) == [name, "x.ckpt"]
    os.utime(name, (time.time() - 4000,) * 2)
    AtomicCheckpointIO().save_checkpoint({"x": 1}, "x.ckpt")
    assert os.listdir() == ["x.ckpt"]


def test_files_of_others_are_nobodys_leftovers() -> None:
    for name in (".x.part", "diloco.part", ".diloco-notes", "old.ckpt"):
        Path(name).write_text("mine")
        os.utime(name, (0, 0))
    AtomicCheckpointIO().save_checkpoint({"x": 1}, "x.ckpt")
    assert sorted(os.listdir()) == [".diloco-notes", ".x.part", "diloco.part", "old.ckpt", "x.ckpt"]


@pytest.mark.parametrize("length", [10, 241, 250, 255])
def test_names_as_long_as_file_systems_allow(length: int) -> None:
    name = "ü" * 10 + "a" * (length - 25) + ".ckpt" if length > 25 else "a" * (length - 5) + ".ckpt"
    assert len(name.encode()) == length
    for path in (name, f"file://{Path.cwd()}/{name}", Path(name)):
        AtomicCheckpointIO().save_checkpoint({"x": 1}, path)
        assert os.listdir() == [name]
        os.unlink(name)


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EACCES])
def test_file_systems_that_lack_a_service_are_written_to(number: int, monkeypatch: Any) -> None:
    for name in ("fsync", "chmod", "fchmod"):
        monkeypatch.setattr(os, name, raising(number))
    AtomicCheckpointIO().save_checkpoint({"x": 1}, "x.ckpt")
    assert torch.load("x.ckpt") == {"x": 1}


def test_new_files_have_the_permissions_of_new_files() -> None:
    before = os.umask(0o027)
    try:
        AtomicCheckpointIO().save_checkpoint({"x": 1}, "x.ckpt")
    finally:
        os.umask(before)
    assert Path("x.ckpt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("where", ["write", "fsync", "open", "replace"])
def test_a_full_disk_is_named_with_the_file_and_leaves_the_old_one(number: int, where: str, monkeypatch: Any) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"x": 1}, "x.ckpt")
    with monkeypatch.context() as patch:
        if where == "write":
            write = diloco_io._Written.write
            calls: list[int] = []

            def full(self: Any, data: Any) -> int:
                calls.append(1)
                if len(calls) > 3:
                    self._file = Full(number)
                return write(self, data)

            patch.setattr(diloco_io._Written, "write", full)
        elif where == "open":
            patch.setattr(os, "open", raising(number, lambda path, *_: str(path).endswith(".part"), os.open))
        else:
            patch.setattr(os, where, raising(number))
        with pytest.raises(OSError) as caught:
            io.save_checkpoint(LARGE, "x.ckpt")
    assert caught.value.errno == number
    assert str(caught.value) == f"[Errno {number}] {os.strerror(number)}: '{Path.cwd()}/x.ckpt'"
    assert os.listdir() == ["x.ckpt"]
    assert torch.load("x.ckpt") == {"x": 1}


class Full:
    def __init__(self, number: int) -> None:
        self.write = raising(number)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's file that is always full")
def test_a_disk_that_is_really_full(monkeypatch: Any) -> None:
    """Through torch's writer, which hides the reason."""
    opens = os.open

    def full(path: Any, *args: Any) -> int:
        descriptor = opens(path, *args)
        if str(path).endswith(".part"):
            device = opens("/dev/full", os.O_RDWR)
            os.dup2(device, descriptor)
            os.close(device)  # else the lock on the device, which all processes of the machine share, stayed
        return descriptor

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '.*x.ckpt'$"):
        AtomicCheckpointIO().save_checkpoint(LARGE, "x.ckpt")
    assert os.listdir() == []


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="a folder of Linux in which no file can be made")
def test_a_folder_that_takes_no_file() -> None:
    with pytest.raises(OSError, match=r"'/sys/kernel/x\.ckpt'$"):
        AtomicCheckpointIO().save_checkpoint({"x": 1}, "/sys/kernel/x.ckpt")


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_file_that_cant_be_made_is_named(number: int, monkeypatch: Any) -> None:
    opens = os.open

    def refuse(path: Any, *args: Any) -> int:
        if str(path).endswith(".part"):
            raise OSError(number, os.strerror(number), path)
        return opens(path, *args)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError) as caught:
        AtomicCheckpointIO().save_checkpoint({"x": 1}, "x.ckpt")
    assert (caught.value.errno, Path(caught.value.filename).name) == (number, "x.ckpt")


@pytest.mark.parametrize("num_nodes", [1, 3])
def test_a_file_object_is_no_path(num_nodes: int, tmp_path: Path) -> None:
    t = trainer(DilocoStrategy(num_nodes, 2), max_steps=2, default_root_dir=tmp_path)
    t.fit(Net(), loader())
    before = set(Path().iterdir())
    with pytest.raises(TypeError, match=r"expected str, bytes or os\.PathLike object, not BytesIO"):
        t.save_checkpoint(io.BytesIO())
    assert set(Path().iterdir()) == before


def test_errors_of_what_is_saved_stay_what_they_are() -> None:
    class Bad:
        def __reduce__(self) -> Any:
            os.stat("nowhere")

    with pytest.raises(FileNotFoundError, match="nowhere"):
        AtomicCheckpointIO().save_checkpoint({"x": Bad()}, "x.ckpt")
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        AtomicCheckpointIO().save_checkpoint({"x": lambda: 1}, "x.ckpt")
    assert os.listdir() == []


# -------------------------------------------------------------------------------------------- plugins


def test_a_wrapper_keeps_lightnings_default_inside() -> None:
    inner = AsyncCheckpointIO()
    for plugin, innermost in ((inner, inner), (AsyncCheckpointIO(AsyncCheckpointIO()), None)):
        t = trainer(DilocoStrategy(num_nodes=2, diloco_interval=2), max_steps=3, plugins=[plugin])
        t.fit(Net(), loader())
        t.save_checkpoint("x.ckpt")
        t.strategy.checkpoint_io.teardown()
        assert t.strategy.checkpoint_io is plugin
        base = (innermost or plugin.checkpoint_io).checkpoint_io
        assert type(base) is TorchCheckpointIO
        assert torch.load("x.ckpt", weights_only=True)["diloco"]["local_steps"] == 3
    given = AtomicCheckpointIO()
    plugin = AsyncCheckpointIO(given)
    t = trainer(DilocoStrategy(num_nodes=2), plugins=[plugin])
    assert t.strategy.checkpoint_io.checkpoint_io is given


class Recorder(CheckpointIO):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None, **more: Any) -> None:
        self.calls.append((str(path), storage_options, more))

    def load_checkpoint(self, *_: Any, **__: Any) -> Any:
        raise ConnectionError("the server sleeps")

    def remove_checkpoint(self, path: Any) -> None: ...


def test_storage_options_go_by_name() -> None:
    class ByName(Recorder):
        def save_checkpoint(self, checkpoint: Any, path: Any, *, storage_options: Any) -> None:
            super().save_checkpoint(checkpoint, path, storage_options)

    plugin = ByName()
    t = trainer(DilocoStrategy(num_nodes=2), max_steps=1, plugins=[plugin])
    t.fit(Net(), loader())
    t.save_checkpoint("x.ckpt", storage_options={"a": 1})
    assert plugin.calls == [("x.ckpt", {"a": 1}, {})]
    t = trainer(DilocoStrategy(num_nodes=2), max_steps=1)
    t.fit(Net(), loader())
    with pytest.raises(TypeError, match=r"storage_options.*not supported for `AtomicCheckpointIO`"):
        t.save_checkpoint("x.ckpt", storage_options={"a": 1})


def test_a_trainers_plugin_is_that_trainers() -> None:
    """Made again from the same arguments, or one after the other, or both before either fits."""
    strategy, plugin = DilocoStrategy(num_nodes=2, diloco_interval=2), Recorder()
    first = trainer(strategy, plugins=[plugin], max_steps=1)
    again = trainer(strategy, plugins=[plugin], max_steps=1)
    assert strategy.checkpoint_io is plugin
    without = trainer(strategy, max_steps=1)
    assert isinstance(strategy.checkpoint_io, AtomicCheckpointIO)
    for t, expected in ((first, 1), (without, 1), (again, 2), (without, 2)):
        t.fit(Net(), loader())
        t.save_checkpoint("x.ckpt")
        assert len(plugin.calls) == expected
    by_hand = Recorder()
    without = trainer(strategy, max_steps=1)
    without.strategy.checkpoint_io = by_hand
    without.fit(Net(), loader())
    without.save_checkpoint("x.ckpt")
    assert len(by_hand.calls) == 1
    own = Recorder()
    strategy = DilocoStrategy(num_nodes=2, checkpoint_io=own)
    assert trainer(strategy).strategy.checkpoint_io is own
    assert trainer(strategy).strategy.checkpoint_io is own


# -------------------------------------------------------------------------------------------- reading


class Unknown:
    """What weights_only refuses."""


def test_only_truncated_files_are_called_truncated() -> None:
    module, strategy = Net(), DilocoStrategy(num_nodes=2, diloco_interval=2)
    t = trainer(strategy, max_steps=3)
    t.fit(module, loader())
    t.save_checkpoint("good.ckpt")
    content = Path("good.ckpt").read_bytes()

    def error(path: str, **kwargs: Any) -> BaseException:
        fresh = Net()
        before = copy_of(fresh.state_dict())
        t = trainer(DilocoStrategy(num_nodes=2, diloco_interval=2), max_steps=4, **kwargs)
        with pytest.raises(Exception) as caught:
            t.fit(fresh, loader(), ckpt_path=path)
        assert_same(copy_of(fresh.state_dict()), before)
        return caught.value

    for share in (0, 0.01, 0.3, 0.7, 0.999):
        Path("cut.ckpt").write_bytes(content[: int(share * len(content))])
        assert isinstance(error("cut.ckpt"), ValueError)
        assert str(error("cut.ckpt")).startswith("The checkpoint cut.ckpt can't be read: it is truncated, or no check")
    checkpoint = torch.load("good.ckpt", weights_only=True)
    torch.save({**checkpoint, "further": Unknown()}, "unknown.ckpt")
    with pytest.raises(pickle.UnpicklingError) as expected:
        torch.load("unknown.ckpt", weights_only=True)
    raised = error("unknown.ckpt")
    assert type(raised) is type(expected.value)
    assert "weights_only" in str(raised)
    assert str(raised) == str(expected.value)
    broken = content.replace(b"data.pkl", b"data.qkl")
    Path("broken.ckpt").write_bytes(broken)
    assert "truncated" not in str(error("broken.ckpt"))
    assert type(error("none.ckpt")) is FileNotFoundError
    Path("cut.ckpt").write_bytes(content[:100])
    refused = error("cut.ckpt", plugins=[Recorder()])
    assert (type(refused), str(refused)) == (ConnectionError, "the server sleeps")
