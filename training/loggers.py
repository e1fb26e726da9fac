"""`--log`: what stats.jsonl holds, and the pictures, for TensorBoard or Weights & Biases too; rank 0 alone writes.

The step of every point is the number of trajectories (images) so far. A run that goes on from a saved state leaves no
point twice: TensorBoard hides what came after that state, Weights & Biases takes no step that it has already.

A package that is missing or cannot start ends the command, before the run or before it goes on. What goes wrong later
(a full disk, a server) ends the logging, with a warning in the run's log: plain files hold the same numbers.
"""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dnnlib import UserError, first_line, write_text

#: For each package, the module to import and what is used of it.
MODULES = {"tensorboard": ("torch.utils.tensorboard", "SummaryWriter"), "wandb": ("wandb", "init")}
LOGGERS = tuple(MODULES)
PICTURE = "teacher and student"
WANDB_ID = "wandb-id.txt"


def need_logger(name: str) -> Any:
    """The module behind `--log`, or one clear line."""
    path, attribute = MODULES[name]
    try:
        module = importlib.import_module(path)
        getattr(module, attribute)  # a folder `wandb` that a run left somewhere can be imported too
    except Exception as error:  # packages that do not fit together end in any error
        raise UserError(
            f"--log={name} needs the {name} package ({first_line(error)}); run: pip install {name}"
        ) from None
    return module


class TensorBoard:
    """Event files in the run directory; those of an earlier start stay and are read before."""

    def __init__(self, module: Any, run_dir: Path, settings: Mapping[str, Any], images: int) -> None:
        # The point at `images` was written before the state was; a run from the start has none yet.
        self._writer = module.SummaryWriter(str(run_dir), purge_step=images + 1 if images else 0)
        known = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        # `add_hparams` would make a run of its own below this one.
        for summary in module.summary.hparams(known, {"loss": 0}):
            self._writer.file_writer.add_summary(summary)

    def scalars(self, values: Mapping[str, float], images: int) -> None:
        for name, value in values.items():
            if name != "kimg":
                self._writer.add_scalar(name, value, images)
        self._writer.flush()  # it would keep two minutes of them, which a killed process loses

    def picture(self, picture: Image.Image, images: int) -> None:
        self._writer.add_image(PICTURE, np.asarray(picture), images, dataformats="HWC")
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases below the run directory, of the same id whenever the run goes on.

    Nothing is sent unless WANDB_MODE=online says so; `wandb sync` sends it later.
    """

    def __init__(self, module: Any, run_dir: Path, settings: Mapping[str, Any], images: int) -> None:
        self._module = module
        self._run = module.init(
            project=os.environ.get("WANDB_PROJECT", "sfd"),
            name=run_dir.resolve().name,
            id=_wandb_id(run_dir),
            resume="allow",
            dir=str(run_dir),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(settings),
            allow_val_change=True,  # a run may go on with other intervals, or by --resume-override
            settings=module.Settings(console="off"),  # log.txt has what is printed
        )
        self._run.define_metric("kimg")
        self._run.define_metric("*", step_metric="kimg")

    def scalars(self, values: Mapping[str, float], images: int) -> None:
        self._run.log(dict(values), step=images)

    def picture(self, picture: Image.Image, images: int) -> None:
        self._run.log({PICTURE: self._module.Image(picture), "kimg": images / 1000}, step=images)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _wandb_id(run_dir: Path) -> str:
    """Drawn at the first start; in a file of the run, so that it moves with it."""
    path = run_dir / WANDB_ID
    if not path.exists():
        write_text(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()


Backend = TensorBoard | WandB
BACKENDS: dict[str, type[Backend]] = {"tensorboard": TensorBoard, "wandb": WandB}


class RunLogger:
    """The logger of a run; whatever goes wrong in it, the run goes on.

    Args:
        name: of `LOGGERS`.
        settings: hyper-parameters to show.
        images: where the run starts or goes on from; later points of an earlier start do not count.
        warn: takes a line for the run's log.
    """

    def __init__(
        self, name: str, run_dir: Path, settings: Mapping[str, Any], images: int, warn: Callable[[str], None]
    ) -> None:
        self._name, self._warn = name, warn
        module = need_logger(name)
        try:
            self._backend: Backend | None = BACKENDS[name](module, run_dir, settings, images)
        except Exception as error:
            raise UserError(f"--log={name} cannot start ({first_line(error)}); mend it, or leave it out") from None

    def scalars(self, stats: Mapping[str, float | None], images: int) -> None:
        """A line of stats.jsonl; what was not finite has no point."""
        values = {k: v for k, v in stats.items() if v is not None and k not in ("images", "timestamp")}
        self._attempt(lambda backend: backend.scalars(values, images))

    def picture(self, picture: Image.Image, images: int) -> None:
        self._attempt(lambda backend: backend.picture(picture, images))

    def close(self, failed: bool) -> None:
        self._attempt(lambda backend: backend.close(failed))
        self._backend = None

    def _attempt(self, action: Callable[[Backend], None]) -> None:
        if self._backend is None:
            return
        try:
            action(self._backend)
        except Exception as error:
            self._backend = None
            self._warn(f"Warning: --log={self._name} has ended ({first_line(error)}); the run goes on without it")
