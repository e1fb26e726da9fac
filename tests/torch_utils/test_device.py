"""Memory orders, plain operations, and threads of several processes."""

import pytest
import torch

from torch_utils import device as devices
from torch_utils.device import channels_last_on, is_plain, plain_operations, prefers_channels_last

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_settings_end_with_their_context():
    assert prefers_channels_last(CPU) and not prefers_channels_last(CUDA) and not is_plain()
    with pytest.raises(RuntimeError), channels_last_on("cuda"):
        assert prefers_channels_last(CUDA) and not prefers_channels_last(CPU)
        with plain_operations():
            assert is_plain() and not prefers_channels_last(CUDA)
        raise RuntimeError
    assert prefers_channels_last(CPU) and not prefers_channels_last(CUDA) and not is_plain()


@pytest.mark.parametrize("environment, started_with, threads", [
    ({}, None, None),  # no torchrun: nothing changes
    ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, b"HOME=/\0", 4),
    ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, b"HOME=/\0OMP_NUM_THREADS=1\0", None),
    ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}, b"", None),
    ({"LOCAL_WORLD_SIZE": "16", "OMP_NUM_THREADS": "1"}, b"", 1),
])  # fmt: skip
def test_processes_share_the_cores(monkeypatch, environment, started_with, threads):
    for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: started_with)
    devices.share_cores()
    assert chosen == ([] if threads is None else [threads])


def test_a_process_decodes_and_encodes_on_its_share_of_the_cores(monkeypatch):
    """Those that it may use (taskset, Slurm), not all that the machine has."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 6}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    found = []
    for processes in ("1", "2", "8"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        found.append(devices.own_cores())
    assert found == [3, 1, 1]
