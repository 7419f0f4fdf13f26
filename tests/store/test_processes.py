"""Stores in other processes: forked and spawned children, DataLoader workers, checkpoints, killed runs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.programs import check_exit
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp

from softdb import IndexConfig, SoftKVStore
from softdb.filters import Selection
from softdb.optim import RowAdam

ROOT = Path(__file__).parents[2]
METHODS = multiprocessing.get_all_start_methods()


def start(*arguments: str, threads: int = 1) -> subprocess.Popen[str]:
    """Start Python in a process that can import the tests and softdb, with a number of OpenMP threads."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads), "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str], code: int = 0, seconds: float = 600.0) -> list[str]:
    """Wait for a process, check its exit code, and return the lines it printed; kill it after a timeout."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"no end within {seconds} s: {out}{err[-2000:]}") from None
    check_exit(subprocess.CompletedProcess(process.args, process.returncode, out, err), code)
    return out.splitlines()


# -- children that read what their parent reads ------------------------------------------------------------------------

# The time limits end a hung child. They are long, so that a busy machine does not exceed them.
CHILDREN = """
import sys

first, *methods = sys.argv[1:]
if first == "faiss":
    import faiss
import multiprocessing
import torch
import softdb
import faiss

def reads(store, query):
    faiss.cvar.indexIVF_stats.reset()
    best = store.read(query, "topk", k=5)
    assert faiss.cvar.indexIVF_stats.nq >= len(query)  # the index was searched, not all rows
    return best.ids, best.values, store.read(query).values

def child(store, query, connection):
    connection.send("started")
    connection.send([tensor.tolist() for tensor in reads(store, query)])

if __name__ == "__main__":
    torch.manual_seed(0)
    centers = 9 * torch.randn(64, 16)
    keys = centers.repeat(100, 1) + torch.randn(6400, 16)
    store = softdb.SoftKVStore(16, 4, metric="cosine", index=softdb.IndexConfig("IVF64,Flat", recall=1.0))
    store.add(keys, torch.randn(6400, 4))
    query = centers.repeat(3, 1) + torch.randn(192, 16)
    expected = reads(store, query)
    children = []
    for method in methods:
        context = multiprocessing.get_context(method)
        parent_end, child_end = context.Pipe()
        process = context.Process(target=child, args=(store, query, child_end), daemon=True)
        process.start()
        children.append((method, process, parent_end))
    for method, process, connection in children:
        assert connection.poll(300), f"{method}: did not start"
        assert connection.recv() == "started"
        if not connection.poll(100):
            process.kill()
            raise SystemExit(f"{method}: the child hangs")
        ids, best, exact = map(torch.tensor, connection.recv())
        assert torch.equal(ids, expected[0]), method
        assert torch.allclose(best, expected[1], atol=1e-5), method
        assert torch.allclose(exact, expected[2], atol=1e-5), method
        process.join(100)
        assert process.exitcode == 0, method
        print(method)
    again = store.read(query, "topk", k=5)
    assert torch.equal(again.ids, expected[0])
    assert torch.allclose(store(query), expected[2], atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("first", "threads"), [("torch", 1), ("faiss", 2)])
def test_a_child_process_reads_the_same_as_its_parent(first: str, threads: int, tmp_path: Path) -> None:
    """Test both import orders of torch and faiss, one or two threads, and start methods: all, and the first two."""
    program, methods = tmp_path / "children.py", METHODS[: None if threads == 1 else 2]
    program.write_text(CHILDREN)
    assert finish(start(str(program), first, *methods, threads=threads)) == methods


# Prints, for each action of a parent, the number of threads of torch in a child that the parent forks afterwards. Each
# parent is itself forked from a process that has only imported softdb, so that all share the imports.
THREADS = """
import os, signal, sys, traceback
import torch
import softdb
from softdb.functional import soft_read, topk_read
from softdb.layers import ProductKeyMemory

def fork(action):
    child = os.fork()
    if child == 0:
        signal.alarm(100)  # the parent waits no longer
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise SystemExit(f"{action}: {code}")

def parent(name):
    torch.set_num_threads(2)
    query, keys, values = torch.randn(500, 32), torch.randn(20_000, 32), torch.randn(20_000, 8)

    def read():
        return soft_read(query, keys, values)

    before = {
        "import": lambda: None,
        "store": lambda: softdb.SoftKVStore(32, 8),
        "soft_read": read,
        "topk_read": lambda: topk_read(query, keys, values, torch.arange(16).expand(500, 16)),
        "layer": lambda: ProductKeyMemory(16, 64**2)(torch.randn(400, 16)),
    }
    before[name]()

    def child():
        threads = torch.get_num_threads()
        assert read().values.isfinite().all()
        print(name, threads, flush=True)

    fork(child)

for name in sys.argv[1:]:
    fork(lambda: parent(name))
"""


@pytest.mark.slow
@pytest.mark.skipif("fork" not in METHODS, reason="no fork on this system")
def test_a_forked_child_has_one_thread_if_its_parent_has_used_softdb() -> None:
    """A child keeps its threads if its parent only imported softdb; otherwise several threads would hang."""
    expected = {"import": 2, "store": 1, "soft_read": 1, "topk_read": 1, "layer": 1}
    found = dict(line.split() for line in finish(start("-c", THREADS, *expected, threads=2)))
    assert {parent: int(threads) for parent, threads in found.items()} == expected


SEPARATE = """
import multiprocessing
import torch
from softdb import SoftKVStore


class Named(SoftKVStore):
    pass


def child(stores, connection):
    connection.send("started")
    connection.recv()
    for store in stores:
        connection.send((type(store).__name__, len(store), store(torch.ones(1, 4)).tolist()))
        store.values.fill_(7.0)
    connection.send("written")
    connection.recv()


if __name__ == "__main__":
    cases = [(kind, shared) for kind in (SoftKVStore, Named) for shared in (False, True)]
    stores = []
    for kind, shared in cases:
        store = kind(4, 2)
        ids = store.add(torch.eye(4), torch.ones(4, 2))
        if shared:
            store.share_memory()
        stores.append(store)
    parent_end, child_end = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=child, args=(stores, child_end), daemon=True)
    process.start()
    assert parent_end.poll(300) and parent_end.recv() == "started"
    for store in stores:
        store.update(ids, values=torch.full((4, 2), 5.0))
    parent_end.send("go")
    for kind, shared in cases:
        assert parent_end.poll(100)
        name, count, answer = parent_end.recv()
        assert (name, count) == (kind.__name__, 4)
        assert answer == [[5.0, 5.0] if shared else [1.0, 1.0]], answer
    assert parent_end.recv() == "written"
    for store, (_, shared) in zip(stores, cases, strict=True):
        assert bool((store.values == (7.0 if shared else 5.0)).all())
    parent_end.send("end")
    process.join(100)
    assert process.exitcode == 0
"""


@pytest.mark.slow
def test_a_store_sent_to_a_process_is_a_copy_unless_its_memory_is_shared(tmp_path: Path) -> None:
    program = tmp_path / "separate.py"
    program.write_text(SEPARATE)
    finish(start(str(program)))


class Answers(torch.utils.data.Dataset[Tensor]):
    """Dataset of the reads of a store, one per query."""

    def __init__(self, store: SoftKVStore, queries: Tensor) -> None:
        self.store, self.queries = store, queries

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, number: int) -> Tensor:
        query = self.queries[number : number + 1]
        return torch.cat([self.store.read(query, "topk", k=5).values[0], self.store(query)[0]])


def load_by_workers() -> None:
    """Compare reads by DataLoader workers, started after a search, with reads in this process."""
    torch.manual_seed(0)
    centers = 9 * torch.randn(64, 16)
    store = SoftKVStore(16, 4, metric="cosine", index="IVF64,Flat")
    store.add(centers.repeat(50, 1) + torch.randn(3200, 16), torch.randn(3200, 4))
    dataset = Answers(store, centers[:40] + torch.randn(40, 16))
    expected = torch.cat([store.read(dataset.queries, "topk", k=5).values, store(dataset.queries)], 1)
    assert store.index_stats().builds == 1
    for method in METHODS:
        workers = 2 if method == "fork" else 1  # each other worker imports all modules
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=8, num_workers=workers, multiprocessing_context=method, timeout=300
        )
        assert torch.allclose(torch.cat(list(loader)), expected, atol=1e-5), method
        print(method)


@pytest.mark.slow
def test_data_loader_workers_read_a_store() -> None:
    assert finish(start("-c", "import test_processes as t; t.load_by_workers()", threads=2)) == METHODS


# -- checkpoints of torch ----------------------------------------------------------------------------------------------


def empty(**options: Any) -> SoftKVStore:
    """Create an empty store."""
    return SoftKVStore(8, 3, fields=("time",), **options)


def filled(**options: Any) -> tuple[SoftKVStore, Tensor]:
    """Create a store of 20 rows, without its highest id and with free slots, and queries."""
    generator = torch.Generator().manual_seed(0)
    store = empty(**options)
    for moment in range(3):
        rows = torch.randn(7, 11, generator=generator)
        store.add(rows[:, :8], rows[:, 8:], fields={"time": moment})
    store.delete([20])
    return store, torch.randn(5, 8, generator=generator)


def check_equal(store: SoftKVStore, loaded: SoftKVStore, query: Tensor) -> None:
    """Check that both stores have the same rows, give the same reads and assign the same next id."""
    assert torch.equal(loaded.ids, store.ids)
    assert torch.equal(loaded.get(store.ids).fields["time"], store.get(store.ids).fields["time"])
    for how in ({"k": 4}, {"mode": "topk", "k": 4}, {"mode": "hard"}, {"where": lambda row: row["time"] > 0}):
        expected, found = store.read(query, **how), loaded.read(query, **how)
        assert torch.equal(expected.values, found.values)
        assert expected.ids is None or torch.equal(expected.ids, found.ids)
    assert [each.add(query[:1], query[:1, :3], fields={"time": 9}).item() for each in (store, loaded)] == [21, 21]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "trainable": {"trainable": True},
    "fixed": {"capacity": 30, "evict": "lru", "track_usage": True},
}


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_state_dict_can_be_saved_and_loaded_with_weights_only(
    options: dict[str, Any], rows: int, tmp_path: Path
) -> None:
    store, query = filled(**options)
    torch.save(store.state_dict(), tmp_path / "store.pt")
    loaded = empty(**options)
    if rows:
        loaded.add(torch.ones(rows, 8), torch.ones(rows, 3), fields={"time": 0})
    loaded.load_state_dict(torch.load(tmp_path / "store.pt", weights_only=True))
    check_equal(store, loaded, query)


def load_in_place(path: Path, options: dict[str, Any]) -> SoftKVStore:
    """Load in place, into a store that `reserve` has grown to the saved size."""
    loaded = empty(**options)
    if loaded.capacity is None:
        loaded.reserve(dcp.FileSystemReader(path).read_metadata().state_dict_metadata["store.keys"].size[0])
    dcp.load({"store": loaded}, checkpoint_id=path)
    return loaded


def load_into_new_tensors(path: Path, options: dict[str, Any]) -> SoftKVStore:
    """Load into new tensors, then into a store of another size by `load_state_dict`."""
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {name: torch.empty(of.size, dtype=of.properties.dtype) for name, of in saved.items()}
    dcp.load(state, checkpoint_id=path)
    loaded = empty(**options)
    loaded.load_state_dict({name.removeprefix("store."): tensor for name, tensor in state.items()})
    return loaded


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize("load", [load_in_place, load_into_new_tensors])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_store_can_be_saved_and_loaded_by_distributed_checkpoint(
    options: dict[str, Any], load: Callable[[Path, dict[str, Any]], SoftKVStore], tmp_path: Path
) -> None:
    store, query = filled(**options)
    dcp.save({"store": store}, storage_writer=dcp.FileSystemWriter(tmp_path))
    check_equal(store, load(tmp_path, options), query)


# -- killed and resumed training ---------------------------------------------------------------------------------------

STEPS, STEPS_PER_CHECKPOINT = 24, 4


def new_run() -> tuple[SoftKVStore, nn.Module]:
    generator = torch.Generator().manual_seed(0)
    store = SoftKVStore(8, 2, trainable=True)
    store.add(torch.randn(300, 8, generator=generator), torch.zeros(300, 2))
    encoder = nn.Linear(5, 8)
    with torch.no_grad():
        encoder.weight.copy_(torch.randn(8, 5, generator=generator))
        encoder.bias.zero_()
    return store, encoder


def save_run(folder: Path, step: int, store: SoftKVStore, rest: dict[str, Any], *, kill: bool = False) -> None:
    """Save a step to its own directory; the file written last marks it as complete."""
    path = folder / f"step-{step:06}"
    path.mkdir(parents=True, exist_ok=True)
    store.save(path / "store")
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save({"step": step} | rest, path / "rest.writing")
    os.replace(path / "rest.writing", path / "rest.pt")


def load_run(folder: Path) -> tuple[SoftKVStore, dict[str, Any]] | None:
    """Load the latest complete step."""
    complete = sorted(folder.glob("step-*/rest.pt"))
    if not complete:
        return None
    return SoftKVStore.load(complete[-1].parent / "store"), torch.load(complete[-1], weights_only=True)


def train(folder: str, kill_at: int = -1, kill: str = "") -> None:
    """Train from the latest checkpoint, print each loss exactly, and optionally kill this process at a step."""
    torch.set_num_threads(1)
    store, encoder = new_run()
    resumed = load_run(Path(folder))
    if resumed is not None:
        store = resumed[0]
    slow, fast = torch.optim.Adam(encoder.parameters(), lr=0.01), RowAdam(store.parameters(), lr=0.05)
    parts: dict[str, Any] = {"encoder": encoder, "slow": slow, "fast": fast}
    first = 0
    if resumed is not None:
        first = resumed[1]["step"]
        for name, part in parts.items():
            part.load_state_dict(resumed[1][name])
    for step in range(first, STEPS):
        generator = torch.Generator().manual_seed(step)
        question = torch.randn(32, 5, generator=generator)
        loss = (store.read(encoder(question), "topk", k=8).values - question[:, :2].tanh()).square().mean()
        slow.zero_grad()
        fast.zero_grad()
        loss.backward()
        if step == kill_at and kill == "within a step":
            os.kill(os.getpid(), signal.SIGKILL)
        slow.step()
        fast.step()
        if step % 3 == 2:  # replaces some rows
            store.delete(store.ids[:4])
            store.add(torch.randn(7, 8, generator=generator), torch.zeros(7, 2))
        print(step, loss.item().hex(), int(store.ids.max()), flush=True)
        if (step + 1) % STEPS_PER_CHECKPOINT == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            save_run(Path(folder), step + 1, store, state, kill=step == kill_at)


def train_in_children(runs: list[tuple[Any, ...]]) -> None:
    """Train in forked children, one after the other, which share the imports.

    Print the exit code of each, the number of saved stores, and the number of complete checkpoints.
    """
    for arguments in runs:
        child = os.fork()
        if child == 0:
            train(*arguments)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        stores, complete = (len(list(Path(arguments[0]).glob(f"*/{name}"))) for name in ("store", "rest.pt"))
        print("exit", code, stores, complete, flush=True)


@pytest.mark.slow
@pytest.mark.skipif("fork" not in METHODS, reason="no fork on this system")
def test_a_killed_run_resumes_with_identical_losses(tmp_path: Path) -> None:
    """Kill the run within a step, and between the two files of a checkpoint."""

    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    runs = [(whole,), (killed, 9, "within a step"), (killed, 15, "between two files"), (killed,)]
    printed = finish(start("-c", f"import test_processes as t; t.train_in_children({runs!r})"))
    found: list[list[str]] = [[]]
    for line in printed:
        found[-1].append(line)
        if line.startswith("exit"):
            found.append([])
    *expected, code = found[0]
    assert code == "exit 0 6 6"
    assert [line.split()[0] for line in expected] == [str(step) for step in range(STEPS)]
    assert found[1] == [*expected[:9], f"exit {-signal.SIGKILL} 2 2"]
    assert found[2] == [*expected[8:16], f"exit {-signal.SIGKILL} 4 3"]
    assert found[3] == [*expected[12:], "exit 0 6 6"]  # from the last complete checkpoint


# -- forks while other threads work -----------------------------------------------------------------------

WIDTH = 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_inherit_locks_of_other_threads() -> None:
    store = SoftKVStore(WIDTH, 2)
    store.add(torch.randn(400, WIDTH), torch.randn(400, 2))
    held, done = threading.Event(), threading.Event()

    def write() -> None:
        with store.writing():
            held.set()
            done.wait(30)

    thread = threading.Thread(target=write)
    thread.start()
    assert held.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        store.read(torch.ones(1, WIDTH))
        store.add(torch.ones(1, WIDTH), torch.ones(1, 2))
        os._exit(0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class SlowMask:
    """Mask whose sum blocks until `done` is set."""

    def __init__(self) -> None:
        self.counting, self.done = threading.Event(), threading.Event()

    def sum(self) -> int:
        self.counting.set()
        self.done.wait(30)
        return 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_can_read_while_a_parent_thread_reads() -> None:
    store, mask = SoftKVStore(WIDTH, 2), SlowMask()
    store.add(torch.ones(9, WIDTH), torch.ones(9, 2))
    selection: Any = Selection(1, shared=mask)  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: selection.shared_count)
    thread.start()
    assert mask.counting.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        store.delete([1, 2])
        store.read(torch.ones(1, WIDTH))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    mask.done.set()
    thread.join()
    assert status == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_drops_a_background_build() -> None:
    store = SoftKVStore(8, 2, index=IndexConfig("IVF64,Flat", background=True))
    centers = torch.randn(100, 8)
    store.add(centers[torch.arange(20_000) % 100] + 0.2 * torch.randn(20_000, 8), torch.randn(20_000, 2))
    query = centers[:5]
    store.read(query, "topk", k=3)
    assert store._index.background is not None
    child = os.fork()
    if child == 0:
        same = torch.equal(store.read(query, "topk", k=3).ids, store.read(query, k=3).ids)
        right = store._index.background is None and same
        os._exit(0 if right else 1)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    if done == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done[1] == 0
    store.refresh(wait=True)
    assert store.index_stats().builds == 1
