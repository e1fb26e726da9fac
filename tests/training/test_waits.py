"""A GPU is never waited for within an iteration: nothing is read from it, and the count of skipped steps lags by one."""

import types
from unittest import mock

import pytest
import torch
from test_distill import GOLDEN, make_distiller
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.sampling import student_sampler
from torch_utils import transfers
from training import health

#: Operations whose result the host needs: what runs them waits until a GPU has come to them.
READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "_unique2", "bincount", "equal"}


class Reads(TorchDispatchMode):
    """The names of operations that read values, while it is on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        masked = name.startswith("index") and any(t.dtype == torch.bool for t in tensors[1:])
        # Schedules are float64, and on the CPU everywhere.
        if (name in READS or masked) and tensors[0].dtype != torch.float64:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_reads_are_noticed():
    with Reads() as reads:
        assert torch.ones(1).item() == 1 and bool(torch.ones(1)) and len(torch.ones(3)[torch.ones(3) > 0]) == 3
    assert set(reads.seen) == {"_local_scalar_dense", "index"}


@pytest.mark.parametrize("name, changes", [
    *((name, {}) for name in ("sfd", "sfdv", "stage2_v")),
    ("sfd", {"optimizer": "muon"}), ("sfd", {"loss_knee": 0.1}), ("sfd", {"denoise_to_zero": True}),
    ("sfd", {"precision": "bf16"}),
])  # fmt: skip
def test_an_iteration_reads_no_value(name, changes):
    distiller = make_distiller(name, micro=2, **changes)
    if "precision" in changes:
        distiller.student.compute_dtype = distiller.teacher.model.compute_dtype = torch.bfloat16
    noise = GOLDEN["noise"][0]
    labels = torch.eye(distiller.student.label_dim)[: len(noise)] if distiller.student.label_dim else None
    with Reads() as reads:
        distiller.iterate(noise, labels, distiller.config.num_steps)
    assert reads.seen == []


def test_sampling_reads_no_value():
    student = make_distiller("sfd").student.eval()
    with Reads() as reads:
        assert len(student_sampler(student).images(range(20))) == 20
    assert reads.seen == []


class Counter:
    """A tensor on a GPU."""

    device, shape, dtype = torch.device("cuda", 0), torch.Size(), torch.float32
    value = 0


class Host:
    """Pinned memory: what was sent arrives once its event has been waited for."""

    def __init__(self):
        self.arrived = None

    def copy_(self, counter, non_blocking):
        assert non_blocking
        self.sent = counter.value
        return self

    def cpu(self):
        return self

    def __int__(self):
        assert self.arrived is not None, "read before its event"
        return self.arrived


class Event:
    def __init__(self, host):
        self.host, self.is_recorded = host, False

    def record(self):
        self.is_recorded = True

    def synchronize(self):
        assert self.is_recorded
        self.host.arrived = self.host.sent


def test_a_count_on_a_gpu_lags_by_exactly_one_poll():
    hosts = []

    def empty(shape, dtype, pin_memory):
        assert pin_memory
        hosts.append(Host())
        return hosts[-1]

    cuda = types.SimpleNamespace(Event=lambda: Event(hosts[-1]))
    counter = Counter()
    count = health.LaggedCount(counter, value=7)
    with mock.patch.object(transfers, "torch", types.SimpleNamespace(empty=empty, cuda=cuda)):
        seen = []
        for counter.value in (8, 9, 12):
            seen.append(count.poll())
        assert seen == [7, 8, 9]
        count.wait()
        assert count.poll() == 12
        count.wait()  # nothing is lost if it is waited for twice
        count.wait()
        assert count.poll() == 12


class Images(Counter):
    def __init__(self, value):
        self.value = value


class Pinned(Host):
    def numpy(self):
        return int(self)


def test_a_gpu_makes_the_next_images_before_these_are_waited_for():
    """One wait for each batch, and none before the next batch was begun."""
    log, hosts = [], []

    class Logged(Event):
        def synchronize(self):
            super().synchronize()
            log.append(f"wait {self.host.sent}")

    def empty(shape, dtype, pin_memory):
        hosts.append(Pinned())
        return hosts[-1]

    def parts():
        for i in range(4):
            log.append(f"make {i}")
            yield Images(i)

    cuda = types.SimpleNamespace(Event=lambda: Logged(hosts[-1]))
    with mock.patch.object(transfers, "torch", types.SimpleNamespace(empty=empty, cuda=cuda)):
        for images in transfers.downloaded(parts()):
            log.append(f"write {images}")
    order = "make 0, make 1, wait 0, write 0, make 2, wait 1, write 1, make 3, wait 2, write 2, wait 3, write 3"
    assert ", ".join(log) == order


def test_on_the_cpu_nothing_is_held_back():
    log = []

    def parts():
        for i in range(2):
            log.append(f"make {i}")
            yield torch.full([1], i)

    for images in transfers.downloaded(parts()):
        log.append(f"write {images[0]}")
    assert ", ".join(log) == "make 0, write 0, make 1, write 1"
