"""What a replica's process is like before it works."""

import platform
import subprocess
import sys

import pytest

POOLS = """
import ctypes, sys, threading
from wanduet.cluster.replica import prepare_process
if sys.argv[1] == "prepared":
    prepare_process(1)
    import torch
    assert torch.get_num_threads() == 1
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
barrier = threading.Barrier(8)
def take():
    libc.malloc(100)
    barrier.wait()
threads = [threading.Thread(target=take) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's pools of memory")
@pytest.mark.parametrize("how", ["prepared", "as it comes"])
def test_a_replicas_threads_share_one_pool_of_memory(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    done = subprocess.run([sys.executable, "-c", POOLS, how], capture_output=True, text=True, check=True)
    assert (done.stdout.count("<heap nr=") == 1) is (how == "prepared")
