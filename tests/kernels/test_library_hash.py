"""Triton's hash of its own library on a thread: begun once, waited for by what compiles, and in nobody's way."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this system")

from triton import knobs
from triton.runtime import cache

from fla_compile.kernels import launch, library_hash
from fla_compile.kernels.launch import Launch
from fla_compile.kernels.library_hash import begin_hash, wait_for_hash

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def not_begun(monkeypatch):
    monkeypatch.setattr(library_hash, "_thread", None)
    monkeypatch.setattr(knobs.runtime, "interpret", False)


@pytest.fixture
def hashing(monkeypatch):
    """A hash in Triton's place, which goes on until `release` is set and then is `done`."""
    state = SimpleNamespace(calls=0, release=threading.Event(), done=False)

    def triton_key():
        state.calls += 1
        assert state.release.wait(60)
        state.done = True

    monkeypatch.setattr(cache, "triton_key", triton_key)
    yield state
    state.release.set()
    wait_for_hash()


def test_triton_finds_the_hash_done():
    cache.triton_key.cache_clear()
    begin_hash()
    wait_for_hash()
    assert cache.triton_key.cache_info()[:2] == (0, 1)
    cache.triton_key()
    assert cache.triton_key.cache_info()[:2] == (1, 1)


def test_it_begins_once(hashing):
    begin_hash()
    thread = library_hash._thread
    begin_hash()
    hashing.release.set()
    wait_for_hash()
    begin_hash()
    assert library_hash._thread is thread and not thread.is_alive() and hashing.calls == 1 and hashing.done


def test_nothing_to_wait_for():
    wait_for_hash()


def test_the_interpreter_needs_none(hashing, monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    begin_hash()
    assert library_hash._thread is None and not hashing.calls


def test_a_triton_without_it(monkeypatch):
    monkeypatch.delattr(cache, "triton_key")
    begin_hash()
    assert library_hash._thread is None


def test_an_error_is_left_to_whoever_compiles(monkeypatch):
    raised = []

    def triton_key():
        raised.append(OSError("no library"))
        raise raised[0]

    monkeypatch.setattr(cache, "triton_key", triton_key)
    monkeypatch.setattr(threading, "excepthook", lambda args: raised.append(args.exc_value))
    begin_hash()
    wait_for_hash()
    assert len(raised) == 1


@pytest.mark.parametrize("first", ["call", "compile"])
def test_what_compiles_waits_and_what_is_compiled_does_not(hashing, monkeypatch, first):
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(hashing.done) or self

        def warmup(self, *args, **options):
            seen.append(hashing.done)

    run = Launch(Kernel(), CPU, (1,), (), num_warps=1)
    begin_hash()
    threading.Timer(0.1, hashing.release.set).start()
    (run if first == "call" else run.compile)()
    assert seen == [True]
    run()
    monkeypatch.setattr(launch, "wait_for_hash", lambda: seen.append("waits"))
    run()
    assert run.run is not None and "waits" not in seen


def in_a_process(code):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


AT_ONCE = """
from fla_compile.kernels import library_hash
library_hash.begin_hash()
print(library_hash._thread is not None)
"""
# Between here and the child's end the thread never is done
FORK = """
import os, threading, warnings
from triton.runtime import cache
from fla_compile.kernels import library_hash
begun = threading.Event()
cache.triton_key = lambda: begun.set() or threading.Event().wait()
library_hash.begin_hash()
begun.wait()
assert library_hash._thread.is_alive()
warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of forks beside threads
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0 and library_hash._thread.is_alive()
    print("parent")
else:
    library_hash.wait_for_hash()
    print("child", flush=True)
"""


def test_a_process_that_ends_meanwhile_says_nothing():
    assert in_a_process(AT_ONCE) == ["True"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_waits_for_nothing():
    assert in_a_process(FORK) == ["child", "parent"]
