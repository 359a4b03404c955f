"""Where the numbers of a run go beside its own files: TensorBoard always, others where the recipe asks for them."""

from collections.abc import Sequence
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from underpaint.errors import InputError
from underpaint.train.run_folder import Run

SHOWN = ("loss", "lr", "gradient_norm", "images_per_second", "data_wait")


class Loggers:
    """TensorBoard; Weights & Biases and MLflow where `names` has them.

    Raises:
        InputError: a name that is not known, or not installed.
    """

    def __init__(self, run: Run, names: Sequence[str], resumed_at: int | None):
        purge = None if resumed_at is None else resumed_at + 1
        self.writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=purge)
        self.others: list[Any] = []
        for name in names:
            try:
                from lightning.pytorch import loggers  # pyright: ignore[reportMissingImports]

                kinds = {"wandb": loggers.WandbLogger, "mlflow": loggers.MLFlowLogger}
                if name not in kinds:
                    raise InputError(f"run.loggers: no logger '{name}'; there are: {', '.join(kinds)}")
                self.others.append(kinds[name](save_dir=str(run.path), name=run.path.name))
            except ImportError as error:
                raise InputError(f"run.loggers: {name} is not installed; pip install underpaint[{name}]") from error

    def write(self, line: dict[str, Any]) -> None:
        """One line of metrics, whose numbers are finite or None."""
        flat = {key: line[key] for key in SHOWN}
        flat |= {f"terms/{key}": value for key, value in line["terms"].items()}
        flat |= {f"probe/{key}": value for key, value in line.get("probe", {}).items()}
        numbers = {key: value for key, value in flat.items() if value is not None}
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, line["step"])
        for other in self.others:
            other.log_metrics(numbers, step=line["step"])

    def back_to(self, step: int) -> None:
        """Forget what TensorBoard was told of later steps, which are made again."""
        self.writer.close()
        self.writer = SummaryWriter(self.writer.log_dir, purge_step=step + 1)

    def close(self) -> None:
        self.writer.close()
        for other in self.others:
            other.finalize("success")
