"""A store in other processes: forked, spawned, as a DataLoader's worker, saved by one and loaded by another, killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.programs import check_exit
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp

from softdb import SoftKVStore
from softdb.optim import RowAdam

ROOT = Path(__file__).parents[2]
METHODS = multiprocessing.get_all_start_methods()


def start(*arguments: str, threads: int = 1) -> subprocess.Popen[str]:
    """A process of its own, with the tests and softdb to import, and so many threads for each product."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads), "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str], code: int = 0, seconds: float = 600.0) -> list[str]:
    """Wait for a process that is to end with ``code``, and return the lines it printed. None outlives its test."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"no end within {seconds} s: {out}{err[-2000:]}") from None
    check_exit(subprocess.CompletedProcess(process.args, process.returncode, out, err), code)
    return out.splitlines()


# -- children that read what their parent reads ------------------------------------------------------------------------

# A child that hangs would hang forever: the limits are long, so that they hold on a busy machine too.
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
    assert faiss.cvar.indexIVF_stats.nq >= len(query)  # not exact, as it would be if that were cheaper
    return best.ids, best.values, store.read(query).values

def child(store, query, connection):
    connection.send("begun")
    connection.send([tensor.tolist() for tensor in reads(store, query)])

if __name__ == "__main__":
    torch.manual_seed(0)
    centres = 9 * torch.randn(64, 16)
    keys = centres.repeat(100, 1) + torch.randn(6400, 16)
    store = softdb.SoftKVStore(16, 4, metric="cosine", index=softdb.IndexConfig("IVF64,Flat", recall=1.0))
    store.add(keys, torch.randn(6400, 4))
    query = centres.repeat(3, 1) + torch.randn(192, 16)
    wanted = reads(store, query)
    children = []
    for method in methods:
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        process = context.Process(target=child, args=(store, query, theirs), daemon=True)
        process.start()
        children.append((method, process, ours))
    for method, process, connection in children:
        assert connection.poll(300), f"{method}: no beginning"
        assert connection.recv() == "begun"
        if not connection.poll(100):
            process.kill()
            raise SystemExit(f"{method}: the child hangs")
        ids, best, exact = map(torch.tensor, connection.recv())
        assert torch.equal(ids, wanted[0]), method
        assert torch.allclose(best, wanted[1], atol=1e-5), method
        assert torch.allclose(exact, wanted[2], atol=1e-5), method
        process.join(100)
        assert process.exitcode == 0, method
        print(method)
    again = store.read(query, "topk", k=5)
    assert torch.equal(again.ids, wanted[0])
    assert torch.allclose(store(query), wanted[2], atol=1e-5)
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("first", ["torch", "faiss"])
def test_a_child_reads_what_its_parent_has_read(first: str, threads: int, tmp_path: Path) -> None:
    """However it is started, whichever library was imported first, and whether they have threads."""
    program = tmp_path / "children.py"
    program.write_text(CHILDREN)
    assert finish(start(str(program), first, *METHODS, threads=threads)) == METHODS


# How many threads torch has in a child, and what the child reads after its parent has done one of these.
THREADS = """
import os, signal, sys
import torch
import softdb
from softdb.functional import soft_read, topk_read
from softdb.layers import ProductKeyMemory

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
before[sys.argv[1]]()
ours, theirs = os.pipe()
child = os.fork()
if child == 0:
    signal.alarm(100)  # nobody waits for it longer
    threads = torch.get_num_threads()
    assert read().values.isfinite().all()
    os.write(theirs, str(threads).encode())
    os._exit(0)
os.close(theirs)
print(os.read(ours, 10).decode())
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif("fork" not in METHODS, reason="no fork on this system")
@pytest.mark.parametrize(
    ("parent", "threads"), [("import", 2), ("store", 1), ("soft_read", 1), ("topk_read", 1), ("layer", 1)]
)
def test_a_forked_child_has_one_thread_if_its_parent_has_used_softdb(parent: str, threads: int) -> None:
    """A child of a program that only imports softdb keeps its threads; others would hang with more than one."""
    assert finish(start("-c", THREADS, parent, threads=2)) == [str(threads)]


APART = """
import multiprocessing
import torch
from softdb import SoftKVStore


class Named(SoftKVStore):
    pass


def child(store, connection):
    connection.send("begun")
    connection.recv()
    connection.send((len(store), store(torch.ones(1, 4)).tolist()))
    store.values.fill_(7.0)
    connection.send("written")
    connection.recv()


if __name__ == "__main__":
    for kind in (SoftKVStore, Named):
        for shared in (False, True):
            store = kind(4, 2)
            ids = store.add(torch.eye(4), torch.ones(4, 2))
            if shared:
                store.share_memory()
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process(target=child, args=(store, theirs), daemon=True)
            process.start()
            assert ours.poll(300) and ours.recv() == "begun"
            store.update(ids, values=torch.full((4, 2), 5.0))
            ours.send("go")
            assert ours.poll(100)
            count, answer = ours.recv()
            assert count == 4
            assert answer == [[5.0, 5.0] if shared else [1.0, 1.0]], answer
            assert ours.recv() == "written"
            assert bool((store.values == (7.0 if shared else 5.0)).all())
            ours.send("end")
            process.join(100)
            assert process.exitcode == 0
"""


def test_a_store_sent_to_a_process_is_a_copy_unless_its_memory_is_shared(tmp_path: Path) -> None:
    program = tmp_path / "apart.py"
    program.write_text(APART)
    finish(start(str(program)))


class Answers(torch.utils.data.Dataset[Tensor]):
    """What a store answers to each of many queries."""

    def __init__(self, store: SoftKVStore, queries: Tensor) -> None:
        self.store, self.queries = store, queries

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, number: int) -> Tensor:
        query = self.queries[number : number + 1]
        return torch.cat([self.store.read(query, "topk", k=5).values[0], self.store(query)[0]])


def load_by_workers() -> None:
    """Read by workers of a DataLoader, which fork or spawn after a search, what this process reads by itself."""
    torch.manual_seed(0)
    centres = 9 * torch.randn(64, 16)
    store = SoftKVStore(16, 4, metric="cosine", index="IVF64,Flat")
    store.add(centres.repeat(50, 1) + torch.randn(3200, 16), torch.randn(3200, 4))
    dataset = Answers(store, centres[:40] + torch.randn(40, 16))
    wanted = torch.cat([store.read(dataset.queries, "topk", k=5).values, store(dataset.queries)], 1)
    assert store.index_stats().builds == 1
    for method in METHODS:
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=8, num_workers=2, multiprocessing_context=method, timeout=300
        )
        assert torch.allclose(torch.cat(list(loader)), wanted, atol=1e-5), method
        print(method)


def test_workers_of_a_data_loader_read_a_store() -> None:
    assert finish(start("-c", "import test_processes as t; t.load_by_workers()", threads=2)) == METHODS


# -- checkpoints that torch writes -------------------------------------------------------------------------------------


def memory(**options: Any) -> SoftKVStore:
    """A store to load into."""
    return SoftKVStore(8, 3, fields=("time",), **options)


def filled(**options: Any) -> tuple[SoftKVStore, Tensor]:
    """A store of 20 rows whose highest id is gone, with more room than rows, and queries."""
    generator = torch.Generator().manual_seed(0)
    store = memory(**options)
    for time in range(3):
        rows = torch.randn(7, 11, generator=generator)
        store.add(rows[:, :8], rows[:, 8:], fields={"time": time})
    store.delete([20])
    return store, torch.randn(5, 8, generator=generator)


def goes_on_as(store: SoftKVStore, loaded: SoftKVStore, query: Tensor) -> None:
    """The same rows and answers, and ids that keep rising."""
    assert torch.equal(loaded.ids, store.ids)
    assert torch.equal(loaded.get(store.ids).fields["time"], store.get(store.ids).fields["time"])
    for how in ({"k": 4}, {"mode": "topk", "k": 4}, {"mode": "hard"}, {"where": lambda row: row["time"] > 0}):
        mine, other = store.read(query, **how), loaded.read(query, **how)
        assert torch.equal(mine.values, other.values)
        assert mine.ids is None or torch.equal(mine.ids, other.ids)
    assert [one.add(query[:1], query[:1, :3], fields={"time": 9}).item() for one in (store, loaded)] == [21, 21]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "trainable": {"trainable": True},
    "fixed": {"capacity": 30, "evict": "lru", "track_usage": True},
}


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_torch_saves_the_state_and_loads_it_without_pickled_code(
    options: dict[str, Any], rows: int, tmp_path: Path
) -> None:
    store, query = filled(**options)
    torch.save(store.state_dict(), tmp_path / "store.pt")
    loaded = memory(**options)
    if rows:
        loaded.add(torch.ones(rows, 8), torch.ones(rows, 3), fields={"time": 0})
    loaded.load_state_dict(torch.load(tmp_path / "store.pt", weights_only=True))
    goes_on_as(store, loaded, query)


def into_a_store_with_room(path: Path, options: dict[str, Any]) -> SoftKVStore:
    """What is loaded goes into tensors that are there: `reserve` makes them as large as the saved ones."""
    loaded = memory(**options)
    if loaded.capacity is None:
        loaded.reserve(dcp.FileSystemReader(path).read_metadata().state_dict_metadata["store.keys"].size[0])
    dcp.load({"store": loaded}, checkpoint_id=path)
    return loaded


def into_tensors_of_its_own(path: Path, options: dict[str, Any]) -> SoftKVStore:
    """Or into new tensors, of which a store of any size takes its state."""
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {name: torch.empty(of.size, dtype=of.properties.dtype) for name, of in saved.items()}
    dcp.load(state, checkpoint_id=path)
    loaded = memory(**options)
    loaded.load_state_dict({name.removeprefix("store."): tensor for name, tensor in state.items()})
    return loaded


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize("load", [into_a_store_with_room, into_tensors_of_its_own])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_distributed_checkpoint_of_a_store(
    options: dict[str, Any], load: Callable[[Path, dict[str, Any]], SoftKVStore], tmp_path: Path
) -> None:
    store, query = filled(**options)
    dcp.save({"store": store}, storage_writer=dcp.FileSystemWriter(tmp_path))
    goes_on_as(store, load(tmp_path, options), query)


# -- a run that is killed and resumed ----------------------------------------------------------------------------------

STEPS, EVERY = 24, 4


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
    """A path of its own for each step. What is written last says that the step is whole."""
    path = folder / f"step-{step:06}"
    path.mkdir(parents=True, exist_ok=True)
    store.save(path / "store")
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save({"step": step} | rest, path / "rest.writing")
    os.replace(path / "rest.writing", path / "rest.pt")


def load_run(folder: Path) -> tuple[SoftKVStore, dict[str, Any]] | None:
    """The latest step that is whole."""
    whole = sorted(folder.glob("step-*/rest.pt"))
    if not whole:
        return None
    return SoftKVStore.load(whole[-1].parent / "store"), torch.load(whole[-1], weights_only=True)


def train(folder: str, kill_at: int = -1, kill: str = "") -> None:
    """Train from the latest checkpoint on, print each loss to the last bit, and be killed at a step if told so."""
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
        if step % 3 == 2:  # rows come and go
            store.delete(store.ids[:4])
            store.add(torch.randn(7, 8, generator=generator), torch.zeros(7, 2))
        print(step, loss.item().hex(), int(store.ids.max()), flush=True)
        if (step + 1) % EVERY == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            save_run(Path(folder), step + 1, store, state, kill=step == kill_at)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal on this system")
def test_a_run_that_was_killed_goes_on_bit_by_bit(tmp_path: Path) -> None:
    """Wherever it was killed: within a step, or when the store was saved and the rest of the checkpoint was not."""

    def run(folder: str, *arguments: object) -> subprocess.Popen[str]:
        given = ", ".join(map(repr, (str(tmp_path / folder), *arguments)))
        return start("-c", f"import test_processes as t; t.train({given})")

    both = run("whole"), run("killed", 9, "within a step")
    wanted, before = finish(both[0]), finish(both[1], -signal.SIGKILL)
    assert [line.split()[0] for line in wanted] == [str(step) for step in range(STEPS)]
    assert before == wanted[:9]
    assert finish(run("killed", 15, "between two files"), -signal.SIGKILL) == wanted[8:16]
    assert (tmp_path / "killed" / "step-000016" / "store").exists()
    assert finish(run("killed")) == wanted[12:]  # from the last step of which both files were there
