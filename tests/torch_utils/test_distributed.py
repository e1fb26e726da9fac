"""One process, accumulation, several processes: the same iterations, the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import (
    ROOT,
    STATS,
    class_teacher,
    distance,
    free_port,
    invoke,
    only_run,
    run_dirs,
    run_ranks,
    second_stage,
    student,
    teacher,
    train_flags,
    weights,
)  # fmt: skip

from dnnlib import UserError
from dnnlib.progress import is_first_process
from torch_utils import distributed
from torch_utils.device import pick_device
from training.conditions import draw_labels, draw_noise, draw_num_steps

CLOSE = 1e-5
VARIANTS = {
    "sfd": {},
    "sfd-v": {"use_step_condition": True, "M": 0},
    "muon": {"optimizer": "muon", "loss_knee": 0.1, "M": 0},
    "classes": {"M": 0, "sampler_tea": "heun"},
}


def source(variant):
    return class_teacher() if variant == "classes" else teacher()


@pytest.mark.parametrize("variant", ["sfd", "sfd-v", "muon", pytest.param("classes", marks=pytest.mark.slow)])
def test_equal_weights_for_every_way_of_splitting_the_batch(variant, tmp_path):
    """Adam's first steps have the size of the rate whatever the size of the gradient, so where a gradient is as small as
    its rounding error, the step's sign is chance: a low rate keeps such steps below the bound, mistakes are above it."""
    changes = {"lr": 1e-4, "total_kimg": 0.04, "seed": 1, **VARIANTS[variant]}
    ways = {"one": (1, None), "accumulated": (1, 2), "two": (2, None)} | ({"both": (2, 2)} if variant == "sfd" else {})
    found, losses = {}, {}
    for name, (processes, batch_gpu) in ways.items():
        args = train_flags(source(variant), outdir=tmp_path / name, batch_gpu=batch_gpu, **changes)
        result = invoke("train", *args) if processes == 1 else run_ranks("train", args, tmp_path, processes)
        result.ok()
        found[name] = weights(only_run(tmp_path / name))
        losses[name] = [json.loads(x)["loss"] for x in (only_run(tmp_path / name) / STATS).read_text().splitlines()]
        expected = (batch_gpu or 8 // processes, processes)
        assert f"micro-batch {expected[0]} of 8" in result.output and f"on {processes}× cpu" in result.output
    start = weights(source(variant))
    assert distance({name: found["one"][name] for name in start}, start) >= 3e-4  # the bound below means something
    for name in ways:
        assert distance(found["one"], found[name]) <= CLOSE, name
        assert losses[name] == pytest.approx(losses["one"], rel=1e-3)


@pytest.mark.slow
def test_equal_weights_in_the_second_stage(tmp_path):
    second_stage(student("seven"), outdir=tmp_path / "one", lr=1e-4, seed=1).ok()
    second_stage(student("seven"), outdir=tmp_path / "accumulated", batch_gpu=4, lr=1e-4, seed=1).ok()
    assert distance(weights(only_run(tmp_path / "one")), weights(only_run(tmp_path / "accumulated"))) <= CLOSE


@pytest.mark.slow
def test_equal_weights_for_four_processes(tmp_path):
    invoke("train", *train_flags(teacher(), outdir=tmp_path / "one", lr=1e-4, seed=1)).ok()
    run_ranks("train", train_flags(teacher(), outdir=tmp_path / "four", lr=1e-4, seed=1), tmp_path, 4).ok()
    assert distance(weights(only_run(tmp_path / "one")), weights(only_run(tmp_path / "four"))) <= CLOSE


def test_two_processes_make_one_run_and_print_once(tmp_path):
    result = run_ranks("train", train_flags(teacher(), outdir=tmp_path, M=0), tmp_path, 2).ok()
    run_dir = only_run(tmp_path)
    assert result.output.count("Student: ") == result.output.count("micro-batch 4 of 8") == 1
    assert [json.loads(x)["images"] for x in (run_dir / STATS).read_text().splitlines()] == [16, 32, 48, 64]
    assert len([x for x in (run_dir / "log.txt").read_text().splitlines() if x.startswith("tick ")]) == 4
    assert not list(run_dir.glob(".*.tmp.*")) and len(run_dirs(tmp_path)) == 1
    assert "Warning" not in result.output, result.output


def test_a_non_finite_loss_on_one_rank_skips_the_step_on_all(tmp_path):
    """A teacher with one poisoned class: only the rank that drew it sees a NaN."""
    from torch_utils.checkpoint import read_network, save_network

    tensors, settings = read_network(class_teacher())
    tensors["model.map_label.weight"][:, 0] = 1e38  # times 0 it is nothing, times 1 the network overflows
    save_network(tmp_path / "poisoned.safetensors", tensors, settings)
    labels = [draw_labels(0, i, 2, 3).argmax(1).tolist() for i in range(8)]
    hit, alone = sum(0 in pair for pair in labels), sum(pair.count(0) == 1 for pair in labels)
    assert alone > 0 and hit < 8
    args = dict(batch=2, total_kimg=0.016, tick=0.002, M=0)
    run_ranks("train", train_flags(tmp_path / "poisoned.safetensors", outdir=tmp_path / "x", **args), tmp_path, 2).ok()
    stats = [json.loads(line) for line in (only_run(tmp_path / "x") / STATS).read_text().splitlines()]
    assert stats[-1]["skipped"] == 2 * hit  # two trained steps each
    trained = weights(only_run(tmp_path / "x"))
    assert all(value.isfinite().all() for value in trained.values())


# --- What an iteration draws -----------------------------------------------------------------------------------------


def test_noise_and_labels_differ_between_samples_iterations_and_seeds():
    shape = (3, 8, 8)
    whole = draw_noise(0, 5, 8, shape)
    assert whole.shape == (8, *shape) and torch.equal(whole, draw_noise(0, 5, 8, shape))
    assert len({tuple(row.flatten()[:4].tolist()) for row in whole}) == 8
    assert not torch.equal(whole, draw_noise(0, 6, 8, shape)) and not torch.equal(whole, draw_noise(1, 5, 8, shape))
    labels = torch.cat([draw_labels(0, i, 64, 3) for i in range(20)])
    assert labels.sum(1).eq(1).all() and labels.mean(0).sub(1 / 3).abs().max() < 0.06
    assert draw_labels(0, 0, 8, 0) is None
    rare = torch.cat([draw_labels(0, i, 64, 3, [0.1, 0.0, 0.9]) for i in range(20)])
    assert rare.sum(1).eq(1).all() and rare.mean(0).sub(torch.tensor([0.1, 0, 0.9])).abs().max() < 0.03
    big = torch.cat([draw_noise(0, i, 64, shape) for i in range(10)])
    assert abs(float(big.mean())) < 0.02 and abs(float(big.std()) - 1) < 0.02


def test_numbers_of_steps_are_drawn_evenly():
    counts = {n: 0 for n in (4, 5, 6, 7)}
    for iteration in range(800):
        counts[draw_num_steps(3, iteration, (4, 5, 6, 7))] += 1
    assert all(150 < count < 250 for count in counts.values())
    assert draw_num_steps(3, 0, (4,)) == 4


# --- The process group -----------------------------------------------------------------------------------------------


def test_without_torchrun_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    distributed.init(torch.device("cpu"))
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.expected_world_size() == 1 and is_first_process()
    assert distributed.on_first_rank(lambda: 7) == 7
    assert distributed.all_reduce_sum(torch.tensor(3.0)) == 3
    with pytest.raises(UserError, match="bad"):
        distributed.on_first_rank(lambda: (_ for _ in ()).throw(UserError("bad")))


JOIN = """
import os, sys, time
import torch
from torch_utils import distributed
torch.set_num_threads(1)
if os.environ["RANK"] == os.environ["LATE"]:
    time.sleep(1.5)
distributed.init(torch.device("cpu"))
print(int(distributed.all_reduce_sum(torch.ones(()))), flush=True)
os._exit(0)  # as a process that is killed: it takes nothing back
"""


def test_processes_that_torchrun_starts_again_find_each_other():
    """Its store is that of the first start, and holds where the processes of then could be reached.

    One rank comes late, so that the other one would find the old address of it.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt, late in (("0", None), ("1", 1), ("2", 0)):
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "LATE": str(late),
                  "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": attempt}  # fmt: skip
        ranks = [
            subprocess.Popen([sys.executable, "-c", JOIN], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                             env={**os.environ, **shared, "RANK": str(rank)})
            for rank in range(2)
        ]  # fmt: skip
        try:
            assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["2\n", "2\n"]
        finally:
            for rank in ranks:
                rank.kill()


LEAVE = """
import os, sys
import torch
from torch_utils import distributed

def threads():
    return sorted(open(f"/proc/self/task/{n}/comm").read().strip() for n in os.listdir("/proc/self/task"))

distributed.init(torch.device("cpu"))
import torch.distributed.nn.functional  # as optimizers do
distributed.all_reduce_sum(torch.ones(()))
if "explicit" in sys.argv:
    distributed.shutdown()
else:
    import atexit
    atexit._run_exitfuncs()  # what the interpreter does first
print([name for name in threads() if "gloo" in name], flush=True)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads as Linux lists them")
@pytest.mark.parametrize("way", ["explicit", "after an error"])
def test_no_thread_of_the_group_outlives_it(way):
    """One that did could abort the process at its end, once in an estimated two hundred launches."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "1", "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", LEAVE, way], cwd=ROOT, env={**os.environ, **env}, timeout=120,
                          stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "[]\n")


# --- Gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_bytes", [1, 40, 1 << 20])
def test_buckets_hold_every_gradient_once_and_one_dtype_each(bucket_bytes):
    grads = [torch.zeros(n) for n in (3, 5, 1)] + [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(4)]
    buckets = list(distributed.gradient_buckets(grads, bucket_bytes))
    assert [id(g) for bucket in buckets for g in bucket] == [id(g) for g in grads]
    assert all(len({g.dtype for g in bucket}) == 1 for bucket in buckets)
    assert len(buckets) == {1: 5, 40: 3, 1 << 20: 3}[bucket_bytes]
    # A bucket is closed by the gradient that fills it, so that all but the last one would be too small without it.
    assert all(sum(g.nbytes for g in bucket[:-1]) < bucket_bytes for bucket in buckets)


AVERAGE = """
import json, os, sys
import torch
from torch_utils import distributed
torch.set_num_threads(1)
distributed.init(torch.device("cpu"))
found = []
for compression in (None, torch.bfloat16):
    for distributed.BUCKET_BYTES in (1, 100, 1 << 20):
        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((7, 3), (5,), (2, 2, 3, 3))]
        rng = torch.Generator().manual_seed(distributed.rank())
        for p in params[:2]:
            p.grad = torch.randn(p.shape, generator=rng)
        params[0].grad = params[0].grad.T.contiguous().T  # any memory order
        distributed.average_gradients(params, compression)
        assert params[2].grad is None
        found.append(torch.cat([p.grad.flatten() for p in params[:2]]).tolist())
if distributed.rank() == 0:
    print(json.dumps(found), flush=True)
distributed.barrier()
distributed.shutdown()
"""


def test_averaged_gradients_are_the_same_for_every_size_of_bucket():
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", AVERAGE], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                         env={**os.environ, **env, "RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    output = [rank.communicate(timeout=120)[0] for rank in ranks]
    found = torch.tensor(json.loads(output[0]))
    sides = []
    for seed in range(2):
        rng = torch.Generator().manual_seed(seed)
        sides.append(torch.cat([torch.randn(shape, generator=rng).flatten() for shape in ((7, 3), (5,))]))
    mean = (sides[0] + sides[1]) / 2
    assert all(torch.equal(row, mean) for row in found[:3])
    assert all(torch.equal(row, found[3]) for row in found[3:])
    sent = (sides[0].bfloat16() + sides[1].bfloat16()).float() / 2
    assert torch.equal(found[3], sent) and not torch.equal(sent, mean)


# --- On a GPU, by stand-ins ------------------------------------------------------------------------------------------


def test_on_a_gpu_objects_and_barriers_go_over_gloo(monkeypatch):
    asked = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda *a, **k: iter([(distributed.dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **k: asked.update(backend=backend, **k))
    monkeypatch.setattr(distributed.atexit, "register", lambda function: asked.update(at_exit=function))
    distributed.init(torch.device("cuda", 1))
    distributed.share_failures(None)
    assert asked["backend"] == "cpu:gloo,cuda:nccl" and asked["device_id"] == torch.device("cuda", 1)
    assert asked["device"] == torch.device("cuda", 1) and asked["at_exit"] is distributed._abandon


@pytest.mark.parametrize("config, calls", [("cpu:gloo,cuda:nccl", ["abort"]), ("cpu:gloo,cuda:gloo", ["destroy"])])
def test_after_an_error_nobody_waits_for_nccl(config, calls, monkeypatch):
    made = []
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_backend_config", lambda: config)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: made.append("destroy"))
    monkeypatch.setattr(distributed.dist.distributed_c10d, "_abort_process_group", lambda: made.append("abort"))
    distributed._abandon()
    assert made == calls


@pytest.mark.parametrize(
    "name, processes, gpus, message",
    [
        ("cuda:0", 2, 2, "device: cuda:0 is one GPU for 2 processes; leave the number out"),
        ("cuda", 4, 2, "4 processes for 2 GPUs"),
        (None, 2, 1, "2 processes for 1 GPUs"),
        ("cuda:3", 1, 2, "needs GPU 3, this machine shows 2"),
    ],
)
def test_processes_that_would_share_a_gpu_are_refused(name, processes, gpus, message, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=message):
        pick_device(name)


def test_a_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert pick_device() == pick_device("cuda") == torch.device("cuda", rank)
