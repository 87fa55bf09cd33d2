"""The folder of a run, and the promise that nothing in it is ever overwritten by another run.

config.toml          the resolved config; `train.py config.toml` runs the same again
adapter/             the PEFT adapter after the last step
checkpoints/         step-NNNNNN: what --resume continues from
pictures/            step-NNNNNN.png: validation prompts without and with the adapter
tensorboard/         curves and the same pictures
"""

from pathlib import Path

from hdl.config import Run, save_run
from hdl.engine.checkpoints import newest_checkpoint
from hdl.errors import HdlError


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"
        self.pictures = path / "pictures"
        self.tensorboard = path / "tensorboard"

    def check(self, run: Run) -> None:
        """HdlError unless the folder is new, empty, or that of the run to resume."""
        used = self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
        if used and not run.resume:
            what = "the output of another run" if self.config.exists() else "not an empty folder"
            raise HdlError(
                f"save.output {self.path} is {what}; nothing was changed there. Give another folder, or --resume to "
                "continue that run"
            )
        if run.resume and not self.config.is_file():
            raise HdlError(f"save.output {self.path} holds no run to resume; start it without --resume")

    def claim(self, run: Run) -> None:
        """Make the folder and write the config into it."""
        try:
            for folder in (self.checkpoints, self.pictures, self.tensorboard):
                folder.mkdir(parents=True, exist_ok=True)
            save_run(run, self.config)
        except OSError as error:
            raise HdlError(f"save.output {self.path} cannot be written to ({error})") from None

    def to_resume(self) -> Path:
        """The checkpoint to continue from."""
        newest = newest_checkpoint(self.checkpoints)
        if newest is None:
            raise HdlError(
                f"{self.checkpoints} holds no checkpoint to resume from; remove {self.path} and start again without "
                "--resume"
            )
        return newest
