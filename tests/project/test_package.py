"""Test the package as a whole: public names, imports, other processes and systems."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typing_example
from support.programs import check_exit

import softdb

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"]
MODULES = [info.name for info in pkgutil.iter_modules(softdb.__path__)]
NESTED = [info.name for info in pkgutil.walk_packages(softdb.__path__, "softdb.") if not info.name.endswith("__main__")]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)


def test_all_lists_exactly_the_public_names() -> None:
    visible = {name for name in vars(softdb) if not name.startswith("_")} - set(MODULES)
    declared = {name for name in softdb.__all__ if name != "__version__"} - set(MODULES)
    assert visible == declared
    assert softdb.__all__ == sorted(softdb.__all__)
    assert {"SoftKVStore", "IndexConfig", "Read", "functional", "optim", "errors"} <= set(softdb.__all__)


@pytest.mark.parametrize("module", NESTED)
def test_every_module_has_a_docstring_and_all(module: str) -> None:
    loaded = importlib.import_module(module)
    assert loaded.__doc__
    is_bare = hasattr(loaded, "__path__") and not Path(str(loaded.__file__)).read_text().count("import")
    for name in () if is_bare else loaded.__all__:
        assert hasattr(loaded, name)


@pytest.mark.parametrize("name", softdb.__all__)
def test_public_names_are_documented(name: str) -> None:
    public = getattr(softdb, name)
    if isinstance(public, type):
        assert public.__doc__
        own = [member for member in vars(public) if not member.startswith("_") and callable(getattr(public, member))]
        assert all(getattr(public, member).__doc__ for member in own)


@pytest.mark.parametrize("module", [softdb.SoftKVStore, *map(vars(softdb.layers).get, softdb.layers.__all__)])
def test_help_of_a_constructor_says_where_its_arguments_are_described(module: type[torch.nn.Module]) -> None:
    assert f"help({module.__name__})" in (inspect.getdoc(module.__init__) or "")
    assert "Args:" in (inspect.getdoc(module) or "")


def test_documented_error_tree_equals_the_classes() -> None:
    documented = re.findall(r"[├└]── (\w+)\s+(?:\((\w+)\))?", softdb.errors.__doc__ or "")
    others = {"SoftDBError", "PerformanceWarning"}
    assert {name for name, _ in documented} | others == set(softdb.errors.__all__)
    for name, builtin in documented:
        error = getattr(softdb.errors, name)
        assert issubclass(error, softdb.SoftDBError)
        if builtin:
            assert issubclass(error, getattr(__import__("builtins"), builtin))
    assert str(softdb.UnknownIdError("ids: no 5")) == "ids: no 5"


@pytest.mark.slow
def test_import_prints_nothing_and_changes_no_setting_of_torch() -> None:
    code = """
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks
before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
import softdb, sys
assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
assert not hooks
assert "matplotlib" not in sys.modules and "faiss.contrib.torch_utils" not in sys.modules
softdb.SoftKVStore(2, 1)
assert not hooks
softdb.SoftKVStore(2, 1, trainable=True)
softdb.SoftKVStore(2, 1, trainable=True)
assert len(hooks) == 1
"""
    done = run("-W", "error", "-c", code)
    check_exit(done)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.slow
def test_torch_is_imported_before_faiss() -> None:
    code = "import sys, softdb; names = list(sys.modules); assert names.index('torch') < names.index('faiss')"
    check_exit(run("-c", code))


# Imports torch and FAISS, then removes the modules and functions that Windows lacks.
EMULATE_WINDOWS = """
import importlib, mmap, os, signal, sys, tempfile
import numpy, safetensors.torch, torch
import faiss
import torch.utils.data
for module in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[module] = None
missing = {
    os: "fork forkpty getuid posix_fadvise pread preadv pwrite pwritev register_at_fork sysconf "
    "O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK",
    signal: "SIGALRM SIGHUP SIGKILL SIGPIPE",
    mmap: "MAP_PRIVATE MAP_SHARED PROT_READ PROT_WRITE",
}
for module, names in missing.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
"""


@pytest.mark.slow
def test_rows_are_added_and_read_on_a_system_without_posix() -> None:
    """Saving raises an error that names the requirement; torch.save saves the state."""
    code = """
import softdb, softdb.cli
store = softdb.SoftKVStore(8, 2, index="IVF4,Flat")
store.add(torch.randn(500, 8), torch.randn(500, 2))
query = torch.randn(3, 8)
store.read(query, "topk", k=4)
for operation in (store.save, softdb.SoftKVStore.load):
    try:
        operation("nowhere")
    except softdb.UnsupportedSystemError as error:
        print(error)
print(softdb.cli.main(["verify", "nowhere"]))
with tempfile.TemporaryFile() as file:
    torch.save(store.state_dict(), file)
    file.seek(0)
    other = softdb.SoftKVStore(8, 2)
    other.load_state_dict(torch.load(file, weights_only=True))
assert torch.equal(other(query), store(query))
"""
    done = run("-W", "error", "-c", EMULATE_WINDOWS + code)
    check_exit(done)
    *errors, code_of_verify = done.stdout.splitlines()
    assert len(errors) == 2
    for error in errors:
        assert re.match(r"path: expected a system with POSIX files and locks, got .*fcntl; save the rows with", error)
    assert code_of_verify == "2"
    assert done.stderr.startswith("softdb: path: expected a system with POSIX")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_reads_copy_no_rows_and_hold_no_matrix_of_scores() -> None:
    """A store is filled and read with little memory in addition to its rows."""
    code = """
import resource, torch, softdb
rows, width = 200_000, 64
store = softdb.SoftKVStore(width, width, index="Flat")
store.reserve(rows)
for _ in range(20):
    store.add(torch.randn(rows // 20, width), torch.randn(rows // 20, width))
query = torch.randn(256, width, requires_grad=True)
store.read(query[:8]).values.sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store.read(query).values.sum().backward()
store.read(query, "hard")
store.read(query, "topk", k=8)
extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(extra)
assert extra < 120, extra  # The scores would take 195 MiB.
"""
    check_exit(run("-c", code))


def test_matrix_has_a_setting_for_each_python_and_torch_and_the_lowest_versions() -> None:
    done = run("scripts/matrix", "--list")
    check_exit(done)
    for version in re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text()):
        if version != "3.11":  # .ci/run runs all checks with Python 3.11.
            assert f"Python {version}, constraints.txt: all tests\n" in done.stdout
    assert "Python 3.10, the lowest versions: all tests\n" in done.stdout
    assert [f"torch 2.{minor}:" in done.stdout for minor in range(6, 14)] == [False, *[True] * 6, False]
    done = run("scripts/matrix", "python2")
    check_exit(done, 2)
    assert "NAME: expected names among avx2, " in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_point_to_existing_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_typing_example_runs() -> None:
    typing_example.main()


def test_package_is_typed() -> None:
    assert (Path(softdb.__file__).parent / "py.typed").exists()
    assert torch.__version__
