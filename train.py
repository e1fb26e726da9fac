"""Distil a diffusion model into a few-step generator: Simple and Fast Distillation (arXiv 2409.19681)."""

from __future__ import annotations

import dnnlib.early  # noqa: F401  # Ctrl-C is one line while torch is imported

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from dnnlib import UserError, one_line_errors
from dnnlib.options import SEED, Command, Real, Whole, device_option, offline_option, precision_option, section
from dnnlib.progress import is_first_process
from models.detectors import check_detector
from models.registry import ROWS, known_names
from solvers import SCHEDULES, SOLVERS
from torch_utils import distributed
from torch_utils.device import configure_backends, pick_device, pick_precision
from torch_utils.graphs import check_mode
from training import loop
from training.config import DistillConfig, check, describe, micro_batch, settle, teacher_name
from training.cost import estimate
from training.evaluation.commands import missing_paths
from training.evaluation.curve import Evaluation
from training.evaluation.sources import REFERENCES
from training.loggers import LOGGERS, need_logger
from training.options import cuda_graph_option, dry_run_option, teacher_option
from training.presets import find_preset
from training.runs import Intervals, Place, plan_run


class MicroBatch(Whole):
    """A positive integer, or `auto`."""

    def convert(  # type: ignore[override]  # `auto` is no integer
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> int | str:
        return value if value == "auto" else super().convert(value, param, context)


def take_preset(context: click.Context, param: click.Parameter, name: str | None) -> str | None:
    """Let a preset's flags be the defaults of this command line."""
    if name is None:
        return None
    try:
        flags = find_preset(name).flags
    except LookupError as error:
        raise click.BadParameter(error.args[0], context, param) from None
    names = {option.lstrip("-"): param.name for param in context.command.params for option in param.opts}
    context.default_map = {names[flag]: value for flag, value in flags.items()}
    return name


def planned_evaluation(
    dataset_name: str, device: torch.device, precision: str, opts: dict[str, Any]
) -> Callable[[], Evaluation] | None:
    """What makes the evaluation of snapshots that the options ask for; None for none."""
    every, ref, detector = opts["eval_every"], opts["eval_ref"] or dataset_name, opts["eval_detector"]
    if every is None:
        return None
    check_detector(detector)
    if missing_paths(ref):
        raise UserError(f"{ref} is no reference; expected a path, a URL, or one of {', '.join(REFERENCES)}", "eval_ref")
    return partial(Evaluation, every, ref, detector, opts["eval_num"], device, precision)


@click.command(cls=Command)
@section("Teacher and output")
@click.option("--preset", help="Flags of training/presets.yaml, which those of the command line override; `python -m "
              "training.presets` lists them", metavar="NAME", is_eager=True, callback=take_preset)  # fmt: skip
@click.option("--dataset_name", help="Teacher: " + known_names(), metavar="NAME")
@click.option("--model_path", help="Second stage: the SFD or SFD-v model (file, run directory or run number); "
              "else: a teacher of your own", metavar="PATH")  # fmt: skip
@teacher_option
@click.option("--outdir", help="Where to save run directories", metavar="DIR", default="./exps")
@click.option("--desc", help="Text to add to the name of the run directory", metavar="STR")
@click.option("--nosubdir", help="Use --outdir itself as the run directory", is_flag=True)
@click.option("--resume", help="auto: continue an unfinished run of the same settings, do nothing if it is finished; "
              "never: start another one; or a run directory or its training state", metavar="auto|never|PATH",
              default="auto")  # fmt: skip
@click.option("--resume-override", help="Let the run of --resume=PATH or --nosubdir go on with other settings",
              is_flag=True)  # fmt: skip
@section("Length and optimisation")
@click.option("--total_kimg", help="Trajectories to train, thousands", type=Real(0, 10**6, min_open=True), default=200)
@click.option("--batch", help="Total batch size, over all processes", type=Whole(1, 2**20), default=128)
@click.option("--batch-gpu", help="Samples that a process handles at a time, the rest accumulates; auto: as many as "
              "fit on the GPU; default: all of its share", metavar="INTEGER|auto",
              type=MicroBatch(1, 2**20))  # fmt: skip
@click.option("--optimizer", help="adam, as published; muon: Muon for weights between hidden layers, at twice "
              "the rate, Adam for the rest", type=click.Choice(["adam", "muon"]), default="adam")  # fmt: skip
@click.option("--lr", help="Learning rate of Adam, at the start", type=Real(0, 1000, min_open=True), default=5e-5)
@click.option("--lr_schedule", help="step: a tenth of it in the second half of the run; linear: falling to zero",
              type=click.Choice(["step", "linear"]), default="step")  # fmt: skip
@click.option("--loss_knee", help="c of the loss c·log(1 + |d|/c); default: |d|, as published", metavar="FLOAT",
              type=Real(0, 10**6, min_open=True))  # fmt: skip
@click.option("--dropout", help="Dropout of the student; default: the teacher's own", type=Real(0, 1))
@click.option("--seed", help="Random seed", type=SEED, default=0)
@section("Student and teacher schedules")
@click.option("--num_steps", help="Timestamps of the student, one more than steps; 4 to 7 with step condition",
              type=Whole(2, 1000), default=4)  # fmt: skip
@click.option("--M", "m", help="Timestamps that the teacher inserts between two of the student's", type=Whole(0, 1000),
              default=3)  # fmt: skip
@click.option("--afs", help="Take the first step analytically, which saves one evaluation", type=bool, default=True)
@click.option("--sampler_tea", help="Teacher solver", type=click.Choice(SOLVERS), default="dpmpp")
@click.option(
    "--max_order", help="Order of a multistep solver: iPNDM 1–4, DPM-Solver++ 1–3; default: highest", type=Whole(1, 4)
)
@click.option("--predict_x0", help="DPM-Solver++: predict the data rather than the noise", type=bool, default=True)
@click.option("--lower_order_final", help="DPM-Solver++: lower the order in the last steps", type=bool, default=True)
@click.option("--thresholding", help="DPM-Solver++: dynamic thresholding of pixel data", type=bool, default=False)
@click.option("--denoise_to_zero", help="Denoise the teacher's last state: one evaluation more, for training only",
              type=bool, default=False)  # fmt: skip
@click.option("--schedule_type", help="Time schedule", type=click.Choice(SCHEDULES), default="polynomial")
@click.option(
    "--schedule_rho", help="Exponent of the schedule; logsnr has none", type=Real(0, 1000, min_open=True), default=7
)
@section("Variants")
@click.option("--use_step_condition", help="SFD-v: one student for 4 to 7 timestamps", type=bool, default=False)
@click.option(
    "--is_second_stage", help="Distil the student of --model_path further, to 1 NFE", type=bool, default=False
)
@click.option("--lpips", help="Second stage: perceptual loss on the last step; in pixel space LPIPS as the published "
              "code computes it or as its authors define it; by the teacher's own features, which need no download; or "
              "none", type=click.Choice(["reference", "standard", "teacher", "off"]), default="reference")  # fmt: skip
@section("Guidance")
@click.option("--guidance_rate", help="Rate at which the teacher is guided in training; its student is sampled without "
              "guidance, in half the evaluations; default: 1, none", type=Real(-1000, 1000))  # fmt: skip
@click.option("--guidance_type", help="teacher: as --guidance_rate says; cfg: none in training, and a text-conditioned "
              "student is sampled with it, the published way, default of ms_coco (7.5); uncond: none",
              type=click.Choice(["uncond", "cfg", "teacher"]))  # fmt: skip
@click.option("--guide", help="File or registered name of a second network, which guidance leads away from: an "
              "unconditional one, or a worse one (autoguidance); default: the teacher without its condition",
              metavar="PATH|NAME")  # fmt: skip
@click.option("--negative_prompt", help="Caption that guidance leads away from; default: the empty one", metavar="TEXT")
@section("Machine")
@precision_option
@device_option
@click.option("--gradient_checkpointing", help="Latent and LSUN networks: less memory, more time", type=bool,
              default=False)  # fmt: skip
@click.option("--bench", help="Let cuDNN time its algorithms", type=bool, default=True)
@click.option("--deterministic", help="CUDA: equal runs give equal weights, more slowly; --bench is off then",
              is_flag=True)  # fmt: skip
@cuda_graph_option
@offline_option
@click.option("--grad_compression", help="Several processes: send gradients as they are, or in bf16, half of the bytes",
              type=click.Choice(list(distributed.COMPRESSIONS)), default="none")  # fmt: skip
@section("Progress")
@click.option("--tick", help="A status line every so many kimg", type=Real(0, 10**6, min_open=True), default=5)
@click.option(
    "--snap", help="Student and picture every so many ticks, and at the end", type=Whole(1, 10**6), default=10
)
@click.option("--dump", help="Training state every so many ticks, and at the end", type=Whole(1, 10**6), default=10)
@click.option("--keep", help="Training states to keep, the newest; with 2 or more a damaged one costs little",
              type=Whole(1, 10**4), default=2)  # fmt: skip
@click.option("--keep_snapshots", help="Students to keep, the newest; default: all", type=Whole(1, 10**6))
@click.option("--validation_prompts", help="Text-conditioned student: captions of the columns of pictures, as "
              "--prompts of sample.py takes them; default: those of training", metavar="TXT|CSV")  # fmt: skip
@click.option("--log", help="Curves and pictures for one of these too, beside the plain files; wandb stays offline "
              "unless WANDB_MODE says otherwise", type=click.Choice(LOGGERS))  # fmt: skip
@click.option("--eval_every", help="Fréchet distance of one in so many snapshots, and of the last, as a line of "
              "metrics.jsonl each; fid.py curve draws them; default: none", type=Whole(1, 10**6))  # fmt: skip
@click.option("--eval_ref", help="What snapshots are compared with, as for fid.py; default: that of the data set",
              metavar="NPZ|URL|PATH|NAME")  # fmt: skip
@click.option("--eval_detector", help="Feature network, as for fid.py", metavar="NAME|PATH", default="inception")
@click.option("--eval_num", help="Images of an evaluation", type=Whole(2, 10**7), default=2000)
@dry_run_option
def main(preset: str | None, dataset_name: str | None, model_path: str | None, m: int, **opts: Any) -> None:
    """Distil a pre-trained diffusion model into a generator of 1 to 5 network evaluations.

    \b
    Examples:
      python train.py --preset=emoji32
      python train.py --dataset_name=emoji32 --total_kimg=4 --batch=64 --lr=3e-4
      torchrun --standalone --nproc_per_node=4 train.py --dataset_name=cifar10
      python train.py --model_path=teachers/mine/teacher.safetensors --total_kimg=20 --batch=64 --lr=3e-4
      python train.py --is_second_stage=True --model_path=1 --num_steps=3 --M=2
    """
    device = pick_device(opts["device"])
    name = teacher_name(dataset_name, model_path, opts["is_second_stage"])
    settings = {k: v for k, v in opts.items() if k in DistillConfig.__dataclass_fields__}
    settings["precision"] = pick_precision(opts["precision"], device)
    if opts["guidance_rate"] is not None and opts["guidance_type"] is None:
        settings["guidance_type"] = "teacher"
    config = DistillConfig(name, model_path=model_path, M=m, **settings)
    check(config)
    place = Place(Path(opts["outdir"]), opts["desc"], not opts["nosubdir"], opts["resume"], opts["resume_override"])
    if place.override and place.chosen is None:
        raise UserError(
            "--resume-override needs --resume=PATH or --nosubdir; --resume=auto continues runs of the same settings"
        )
    processes = distributed.expected_world_size()
    micro_batch(config.batch, opts["batch_gpu"], processes)
    if opts["log"] is not None:
        need_logger(opts["log"])
    check_mode(opts["cuda_graph"], device)
    evaluation = planned_evaluation(name, device, settings["precision"], opts)
    configure_backends(opts["bench"])
    if opts["dry_run"]:
        if is_first_process():
            config = settle(config)
            click.echo(json.dumps(config.to_json(), indent=2))
            click.echo(describe(config, plan_run(place, config)))
            click.echo(estimate(config, device, processes, opts["batch_gpu"], opts["gradient_checkpointing"]))
        return
    if preset and device.type == "cpu" and ROWS[name].loader != "embedded" and is_first_process():
        cost = estimate(config, device, processes, opts["batch_gpu"]).splitlines()[-1]
        click.echo(f"Warning: preset {preset} is made for GPUs and runs on the CPU. {cost}", err=True)
    loop.train(
        config,
        place,
        device,
        intervals=Intervals(opts["tick"], opts["snap"], opts["dump"], opts["keep"], opts["keep_snapshots"]),
        batch_gpu=opts["batch_gpu"],
        gradient_checkpointing=opts["gradient_checkpointing"],
        deterministic=opts["deterministic"],
        cuda_graph=opts["cuda_graph"],
        log=opts["log"],
        teacher_path=opts["teacher_path"],
        validation_prompts=opts["validation_prompts"],
        evaluation=evaluation,
    )


if __name__ == "__main__":
    one_line_errors(main)()
