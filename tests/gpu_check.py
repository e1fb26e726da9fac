"""For the day a GPU is at hand: what is right, and what it takes, in ten minutes on one H100: `bash launch.sh gpu-check`.

Nothing is downloaded; networks have random weights, but for the embedded teacher's. Lines begin with PASS, FAIL, INFO or
SKIP, and all of them are in gpu_check.json too, written after each section. A section begins only while there is time.
`--tiny` goes through all of it on the CPU, at small size; the slow tests do so.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from graph_stand_in import graphs_on_the_cpu
from torch import Tensor

from models.detectors.inception import InceptionV3
from models.detectors.lpips import LPIPS
from models.loading import load_teacher, make_student
from models.networks.layers import freeze
from models.precond import PRECONDITIONERS
from models.registry import get_row
from models.sampling import student_sampler
from torch_utils.checkpoint import read_network
from torch_utils.device import PRECISIONS, channels_last_on, configure_backends, plain_operations
from torch_utils.graphs import Graphs
from torch_utils.metrics.prdc import precision_recall_density_coverage
from training import bench
from training.conditions import draw_noise
from training.config import DistillConfig
from training.distill import Distiller, Teacher
from training.health import Health
from training.inputs import fill_randomly, random_inputs

parser = argparse.ArgumentParser(description="What is right on a GPU, and what it takes.")
parser.add_argument("--out", type=Path, default=Path("."), help="folder for gpu_check.json")
parser.add_argument("--seconds", type=float, default=570, help="no section begins later")
parser.add_argument("--only", default="", help="sections, separated by commas")
parser.add_argument("--tiny", action="store_true", help="on the CPU, at small size")
OPTIONS = argparse.Namespace()
CPU, START = torch.device("cpu"), time.time()
RESULTS: list[dict[str, Any]] = []

UNET = dict(img_resolution=16, img_channels=3, channel_mult=[1, 2])
EDM = dict(**UNET, num_blocks=1, attn_resolutions=[8], dropout=0.0)
GUIDED = dict(**UNET, model_channels=64, num_res_blocks=1, attention_resolutions=[1, 2])
#: Every kind of network: class and arguments.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "DDPM++": ("EDMPrecond", dict(**EDM, model_type="SongUNet", model_channels=32)),
    "NCSN++": ("EDMPrecond", dict(**EDM, model_type="SongUNet", model_channels=32, embedding_type="fourier",
               encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1])),
    "ADM": ("EDMPrecond", dict(**EDM, model_type="DhariwalUNet", model_channels=64, label_dim=10)),
    "EDM2": ("EDM2Precond", dict(**EDM, model_channels=64, label_dim=10)),
    "latent": ("CFGPrecond", dict(**GUIDED, linear_start=0.0015, linear_end=0.0195, num_head_channels=32)),
    "text": ("CFGPrecond", dict(**GUIDED, linear_start=0.00085, linear_end=0.012, attention_type="transformer",
             num_heads=4, context_dim=32)),
    "LSUN": ("ConsistencyPrecond", dict(**GUIDED, attention_type="flash", num_head_channels=32,
             use_scale_shift_norm=True, resblock_updown=True)),
}  # fmt: skip
#: Relative errors, in the Euclidean norm, of values and of gradients.
BOUNDS = {"fp32": (2e-5, 2e-4), "fp16": (1e-2, 6e-2), "bf16": (6e-2, 2e-1)}


def device() -> torch.device:
    return CPU if OPTIONS.tiny else torch.device("cuda", 0)


def left() -> float:
    return OPTIONS.seconds - (time.time() - START)


def say(kind: str, name: str, **values: Any) -> None:
    RESULTS.append({"kind": kind, "name": name, **values})
    shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    print(f"{kind} {name}  {shown}".rstrip(), flush=True)


def check(name: str, fine: bool, **values: Any) -> None:
    say("PASS" if fine else "FAIL", name, **values)


def run_section(section: Callable[[], None]) -> None:
    """Run a section; an error is a result too."""
    name = section.__name__
    if OPTIONS.only and name not in OPTIONS.only.split(","):
        return
    if left() < 30:
        return say("SKIP", name, seconds_left=left())
    began = time.time()
    try:
        section()
    except Exception as error:
        say("FAIL", name, error=f"{type(error).__name__}: {error}"[:400], at=traceback.format_exc().splitlines()[-6:])
    say("INFO", f"section {name}", seconds=time.time() - began)
    (OPTIONS.out / "gpu_check.json").write_text(json.dumps(RESULTS, indent=1))
    if not OPTIONS.tiny:
        torch.cuda.empty_cache()


def relative(found: Tensor, expected: Tensor) -> float:
    a, b = found.double().cpu(), expected.double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def timed(action: Callable[[], Any], budget: float = 2.0) -> float:
    """Seconds of the best run, after two to warm up."""
    for _ in range(1 if OPTIONS.tiny else 2):
        action()
    best, deadline = float("inf"), time.perf_counter() + (0 if OPTIONS.tiny else budget)
    while True:
        best = min(best, bench.timed(action, device()))
        if time.perf_counter() > deadline:
            return best


# --- What is right ---------------------------------------------------------------------------------------------------


def machine() -> None:
    info: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
    if not OPTIONS.tiny:
        gpu = torch.cuda.get_device_properties(device())
        info |= {"gpu": gpu.name, "GiB": gpu.total_memory / 2**30, "cuda": torch.version.cuda}
        info |= {"cudnn": torch.backends.cudnn.version(), "nccl": str(torch.cuda.nccl.version())}
    say("INFO", "machine", **info)


def values() -> None:
    """Values and gradients of every kind of network against float32 on the CPU, in both memory orders."""
    for name, (cls, spec) in SMALL.items():
        net = PRECONDITIONERS[cls](**spec)
        fill_randomly(net)
        inputs = random_inputs(net, 4, CPU) | {"sigma": torch.tensor([80.0, 3.0, 0.5, 0.02])}
        with plain_operations():
            value, gradient = value_and_gradient(net, inputs)
        there = copy.deepcopy(net).to(device())
        for order in ([], [device().type]):
            for precision, (bound, bound_of_gradient) in BOUNDS.items():
                if OPTIONS.tiny and precision == "fp16":
                    continue  # emulated there
                there.compute_dtype = PRECISIONS[precision]
                with channels_last_on(*order):
                    for _ in range(2):  # the second time trained weights are cast together
                        found = value_and_gradient(there, {k: v.to(device()) for k, v in inputs.items()})
                errors = relative(found[0], value), relative(found[1], gradient)
                fine = errors[0] < bound and errors[1] < bound_of_gradient
                label = f"{name}, {'channels_last' if order else 'contiguous'}, {precision}"
                check(label, fine, value=errors[0], gradient=errors[1])


def value_and_gradient(net: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    net.train().requires_grad_(True).zero_grad()
    out = net(**inputs)
    (out.abs().sum() / 128).backward()  # the size of gradients in a run
    return out.detach(), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def distiller(where: torch.device, precision: str, micro_batch: int, batch: int = 8) -> Distiller:
    """Of the embedded teacher, without dropout."""
    config = DistillConfig("emoji32", batch=batch, precision=precision, schedule_rho=3, dropout=0.0)
    teacher = load_teacher("emoji32", device=where)
    sampling = config.sampling(teacher.sigma_min, teacher.sigma_max)
    student = make_student(teacher, sampling)
    student.net.set_dropout(0.0)
    teacher.compute_dtype = student.compute_dtype = PRECISIONS[precision]
    return Distiller(Teacher(teacher, config, sampling), student, config, micro_batch)


def iteration() -> None:
    """Gradients of a whole iteration against the CPU's, for micro-batches and precisions."""

    def gradients(where: torch.device, precision: str, micro_batch: int) -> Tensor:
        found, one = [], distiller(where, precision, micro_batch)
        one._update = lambda loss: found.append(torch.cat([p.grad.flatten() for p in one.trained]).cpu())  # type: ignore
        one.iterate(draw_noise(0, 0, 8, one.student.shape).to(where), None, 4)
        return torch.cat(found)

    expected = gradients(CPU, "fp32", 8)
    ways = {("fp32", 8): 1e-3, ("fp32", 2): 1e-3, ("fp16", 8): 3e-2, ("bf16", 8): 2e-1}
    for (precision, micro_batch), bound in ways.items():
        if OPTIONS.tiny and precision == "fp16":
            continue
        error = relative(gradients(device(), precision, micro_batch), expected)
        check(f"gradients of an iteration, {precision}, micro-batch {micro_batch}", error < bound, relative=error)


def overflow() -> None:
    """A bad step changes nothing, nothing is waited for, and half precision is given up once it overflows."""
    one = distiller(device(), "bf16" if OPTIONS.tiny else "fp16", 8)
    noise = draw_noise(0, 0, 8, one.student.shape).to(device())
    one.iterate(noise, None, 4)
    before = [p.detach().clone() for p in one.trained]
    one._update(torch.full((), float("nan"), device=device()))
    check("a loss that is not finite leaves the weights", all(map(torch.equal, before, one.trained)))
    check("and is counted", int(one.skipped) == 1, skipped=int(one.skipped))
    one.trained[0].grad.fill_(float("inf"))
    one._update(torch.zeros((), device=device()))
    check("a gradient that overflows leaves them too", all(map(torch.equal, before, one.trained)))
    health = Health(one)
    health.check(8)
    if not OPTIONS.tiny:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        one.iterate(noise, None, 4)
        check("an iteration waits for nothing", True)
    except RuntimeError as error:
        check("an iteration waits for nothing", False, error=str(error)[:200])
    finally:
        if not OPTIONS.tiny:
            torch.cuda.set_sync_debug_mode("default")
    if not OPTIONS.tiny:
        with torch.no_grad():
            one.student.net.model.enc["32x32_conv"].weight.mul_(1e6)  # too much for float16, not for float32
        for images in range(5):
            one.iterate(noise, None, 4)
            health.check(images)
        check("an overflow of float16 switches to float32", health.half_off, skipped=int(one.skipped))
    check("weights are finite", all(bool(p.isfinite().all()) for p in one.trained))


def attention() -> None:
    """A fused kernel takes q, k and v of every kind of network as they come."""
    if OPTIONS.tiny:
        return say("SKIP", "attention: the CPU has no choice of kernels")
    from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

    attend, seen = F.scaled_dot_product_attention, []

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        params = SDPAParams(q, k, v, None, 0.0, False, False)
        seen.append(can_use_flash_attention(params, False) or can_use_efficient_attention(params, False))
        return attend(q, k, v)

    for name, (cls, spec) in SMALL.items():
        net = PRECONDITIONERS[cls](**spec).to(device())
        net.compute_dtype = torch.float16
        with mock.patch.object(F, "scaled_dot_product_attention", spy), torch.no_grad():
            net(**random_inputs(net, 2, device()))
        check(f"attention of {name} is fused", all(seen) and bool(seen), calls=len(seen))
        seen.clear()


def sampling() -> None:
    """Images against the CPU's."""
    config = DistillConfig("emoji32", precision="fp32", schedule_rho=3)
    teacher = load_teacher("emoji32")
    student = freeze(make_student(teacher, config.sampling(teacher.sigma_min, teacher.sigma_max)))
    expected = student_sampler(student).images(range(16)).astype(int)
    student.to(device())
    for precision, bound in {"fp32": 1, "bf16": 40}.items():
        student.compute_dtype = PRECISIONS[precision]
        off = abs(student_sampler(student).images(range(16)).astype(int) - expected)
        check(f"16 images, {precision}", off.max() <= bound, largest=int(off.max()), mean=float(off.mean()))
    with graphs_on_the_cpu() if OPTIONS.tiny else nullcontext():
        lines: list[str] = []
        plain, sampler = student_sampler(student), replace(student_sampler(student), graphs=Graphs("on", lines.append))
        off = abs(sampler.images(range(64), batch=16).astype(int) - plain.images(range(64), batch=16))
    check("64 images as CUDA graphs", off.max() <= 1 and not lines, largest=int(off.max()), said=lines)


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def resume() -> None:
    """train.py: equal runs, one interrupted, one under torchrun (NCCL on a GPU); --deterministic makes them equal bits."""
    folder = Path(tempfile.mkdtemp())
    kimg, batch = ("0.048", 8) if OPTIONS.tiny else ("4", 64)
    flags = [
        "train.py", "--dataset_name=emoji32", f"--total_kimg={kimg}", f"--batch={batch}", "--tick=0.008", "--snap=1000",
        "--dump=1", f"--device={device().type}", "--deterministic",
    ]  # fmt: skip
    names = {"whole": [], "again": [], "stopped": [], "torchrun": ["-m", "torch.distributed.run", "--standalone", "--"]}
    runs = {name: start(*launcher, *flags, f"--outdir={folder / name}") for name, launcher in names.items()}
    deadline = time.time() + 120
    while not list((folder / "stopped").glob("*/stats.jsonl")) and time.time() < deadline:
        time.sleep(0.1)
    runs["stopped"].send_signal(signal.SIGTERM)
    output = {name: run.communicate(timeout=300)[0] for name, run in runs.items()}
    check("SIGTERM ends with 75", runs["stopped"].returncode == 75, code=runs["stopped"].returncode)
    runs["stopped"] = start(*flags, f"--outdir={folder / 'stopped'}")
    output["stopped"] += runs["stopped"].communicate(timeout=300)[0]
    wrong = {name: output[name][-500:] for name, run in runs.items() if run.returncode}
    check("train.py ends with 0", not wrong, **wrong)
    weights = {name: read_network(next((folder / name).glob("*/network-snapshot-*.safetensors")))[0] for name in names}
    for name, other in weights.items():
        largest = max(float((other[key] - value).abs().max()) for key, value in weights["whole"].items())
        check(f"--deterministic: {name} has the same bits", largest == 0, largest=largest)


# --- What it takes ---------------------------------------------------------------------------------------------------


def stages(name: str, batch: int) -> None:
    """Every stage of the benchmark in both memory orders, a trajectory as a CUDA graph, and an evaluation compiled."""
    row = get_row(name)
    schedule: dict[str, Any] = dict(schedule_type="discrete", schedule_rho=1) if row.text else {}
    precision = "bf16" if OPTIONS.tiny else "fp16"
    config = DistillConfig(name, batch=batch, precision=precision, **schedule)
    setup = bench.make_setup(bench.random_teacher(row, device()), config)
    for order in ([], [device().type]):
        with channels_last_on(*order):
            freeze(setup.distiller.teacher.model)
            for stage, action in bench.network_stages(setup, config).items():
                if left() < 20:
                    return say("SKIP", f"{name}, {stage}")
                timing = bench.Timing(stage, batch)
                bench.measure(timing, action, device(), 1 if OPTIONS.tiny else 3, warm_up=not OPTIONS.tiny)
                label = f"{name}, {'channels_last' if order else 'contiguous'}, {stage}"
                say("INFO", label, ms=1e3 * timing.seconds, items=batch, GiB=timing.memory / 2**30)
    freeze(setup.distiller.teacher.model)
    with graphs_on_the_cpu() if OPTIONS.tiny else nullcontext():
        trajectory_as_graph(name, setup, config)
    if not OPTIONS.tiny and left() > 150:
        compiled(name, setup)


def trajectory_as_graph(name: str, setup: bench.Setup, config: DistillConfig) -> None:
    """A trajectory replayed as a CUDA graph against its launches one by one, and what --cuda_graph=auto makes of it."""
    teacher, size, lines = setup.distiller.teacher, setup.distiller.micro_batch_size, []
    x = setup.samples[:size] * setup.distiller.student.sigma_max
    cond = None if setup.given is None else setup.given[:size]

    def action() -> Tensor:
        return teacher.trajectory(x, cond, config.num_steps)

    expected, plain = action(), timed(action)
    teacher.graphs = Graphs("on", lines.append)
    states = [action() for _ in range(4)][-1]
    error, took = relative(states, expected), timed(action)
    fine = error < 1e-2 and not lines
    check(
        f"{name}: a trajectory as a CUDA graph", fine, ms=1e3 * took, plain_ms=1e3 * plain, relative=error, said=lines
    )
    teacher.graphs = Graphs("auto")
    action()
    action()
    say("INFO", f"{name}: --cuda_graph=auto", kept=all(teacher.graphs._recordings.values()))
    teacher.graphs = Graphs("off")


def compiled(name: str, setup: bench.Setup) -> None:
    net = setup.distiller.teacher.model.net
    inputs = random_inputs(net, setup.distiller.micro_batch_size, device())
    began, quick = time.time(), torch.compile(net)
    with torch.no_grad():
        quick(**inputs)
        first = time.time() - began
        ms, plain_ms = (1e3 * timed(lambda n=n: n(**inputs)) for n in (quick, net))
    say("INFO", f"{name}: an evaluation by torch.compile", ms=ms, plain_ms=plain_ms, compiling_s=first)


def cifar10() -> None:
    stages("cifar10", 128)


def imagenet64() -> None:
    stages("imagenet64", 64)


def ms_coco() -> None:
    stages("ms_coco", 4)


def emoji32() -> None:
    stages("emoji32", 4 if OPTIONS.tiny else 64)


def evaluation() -> None:
    """Inception features, LPIPS and PRDC against the CPU's."""
    count = 2 if OPTIONS.tiny else 64
    net = freeze(InceptionV3())
    fill_randomly(net)
    images = torch.randint(0, 256, [count, 3, 32, 32], dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected, there = net(images[:2]), copy.deepcopy(net).to(device())
    error, took = relative(there(images[:2].to(device())), expected), timed(lambda: there(images.to(device())))
    check("Inception features", error < 1e-4, relative=error, images_per_s=count / took)
    lpips = LPIPS("reference")
    fill_randomly(lpips)
    x = torch.rand(2, 3, 32, 32)
    expected, there = lpips(x, x.flip(0)), copy.deepcopy(lpips).to(device())
    error = relative(there(x.to(device()), x.flip(0).to(device())), expected)
    check("LPIPS", error < 1e-4, relative=error)
    real, fake = torch.randn(2, 200 if OPTIONS.tiny else 5000, 64, generator=torch.Generator().manual_seed(0)).numpy()
    here = precision_recall_density_coverage(real, fake, device=device())
    check("PRDC", here == precision_recall_density_coverage(real, fake), **here)


def main() -> int:
    parser.parse_args(namespace=OPTIONS)
    OPTIONS.out.mkdir(parents=True, exist_ok=True)
    if not OPTIONS.tiny and not torch.cuda.is_available():
        print("no GPU is visible to torch; --tiny runs on the CPU", file=sys.stderr)
        return 2
    configure_backends()
    sections = [machine, values, iteration, overflow, attention, sampling, resume, evaluation, emoji32]
    for section in sections + ([] if OPTIONS.tiny else [cifar10, imagenet64, ms_coco]):
        run_section(section)
    failed = [result["name"] for result in RESULTS if result["kind"] == "FAIL"]
    passed = sum(result["kind"] == "PASS" for result in RESULTS)
    print(
        f"{passed} passed, {len(failed)} failed{': ' if failed else ''}{'; '.join(failed)}; {time.time() - START:.0f} s"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
