"""The run folder: what it holds, written so that a kill at any moment loses nothing that was promised.

Every file is written under a temporary name and renamed. A checkpoint is a folder with `state.safetensors` (all
tensors) and `state.json` (plain numbers, and checksums of the tensors and of itself); no pickle. `metrics.jsonl` is appended to;
a resume first drops the lines that lie after its checkpoint, since those steps are made again.
"""

import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from underpaint import __version__
from underpaint.config import Recipe
from underpaint.errors import InputError
from underpaint.files import append_lines, read_lines, replacing_folder, write_json, write_text
from underpaint.locking import holds_anything
from underpaint.recipes.recipe import one_line, plain, stored_recipe


class Run:
    """A run folder on disk, by its documented paths."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        return (self.path / "recipe.yaml").is_file()

    def refuse_other(self) -> None:
        """Raises InputError: the path holds something that is not a run, which is never written over."""
        if self.path.is_file() or (self.path.is_dir() and holds_anything(self.path) and not self.exists):
            raise InputError(f"--out {self.path}: exists and is not a run folder; choose another path")

    def create(self, recipe: Recipe) -> None:
        """Make the folder.

        Raises:
            InputError: the path holds something that is not a run, which is never written over.
        """
        self.refuse_other()
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            (self.path / "pictures").mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.path}: cannot be made: {error.strerror}") from error
        self.write_recipe(recipe)

    @property
    def tokenizer(self) -> Path:
        """The visual words of a run whose method predicts some."""
        return self.path / "tokenizer.safetensors"

    # -- plain files ------------------------------------------------------------------------------------------------

    def recipe(self) -> Recipe:
        found = stored_recipe(self.path)
        if found is None:
            raise InputError(f"{self.path}: no recipe.yaml here, so it is not a run folder")
        return found

    def write_recipe(self, recipe: Recipe) -> None:
        write_text(self.path / "recipe.yaml", yaml.safe_dump(plain(recipe), sort_keys=False))

    def write_json(self, name: str, value: Any) -> None:
        write_json(self.path / name, value)

    def append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to a .jsonl file, flushed to disk."""
        append_lines(self.path / name, lines)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of a .jsonl file; a last line cut off by a kill is left out."""
        return read_lines(self.path / name)

    def drop_after(self, name: str, step: int) -> None:
        """Keep the lines of steps up to `step`."""
        kept = [line for line in self.lines(name) if line["step"] <= step]
        write_text(self.path / name, "".join(json.dumps(line) + "\n" for line in kept))

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*[0-9]"))

    def save(self, step: int, tensors: dict[str, Tensor], numbers: dict[str, Any], keep: Iterable[int]) -> None:
        """Write a checkpoint; then delete all but the last two and those of the steps in `keep`."""
        final = self.path / "checkpoints" / f"step-{step:09d}"
        for left in final.parent.glob("*.part"):  # of a process that was killed; no other one writes here
            shutil.rmtree(left)
        with replacing_folder(final) as part:  # in place of a step that was rolled back to and made again
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part / "state.safetensors")
            description = {"format": 2, "step": step, "sha256": _sha256(part / "state.safetensors"), **numbers}
            (part / "state.json").write_text(json.dumps({**description, "own_sha256": _own_sha256(description)}) + "\n")
        kept = {f"step-{k:09d}" for k in keep} | {c.name for c in self.checkpoints()[-2:]}
        for old in self.checkpoints():
            if old.name not in kept:
                shutil.rmtree(old)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint that is whole, or None where there is none."""
        for folder in reversed(self.checkpoints()):
            try:
                numbers = json.loads((folder / "state.json").read_text())
                own = numbers.pop("own_sha256", None)
                if own != _own_sha256(numbers) and not (own is None and numbers["format"] == 1):
                    raise ValueError("the checksum of state.json is wrong")
                if _sha256(folder / "state.safetensors") != numbers["sha256"]:
                    raise ValueError("its checksum is wrong")
                return load_file(folder / "state.safetensors"), numbers
            except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
                print(f"{folder} is damaged ({one_line(error)}); trying the one before", file=sys.stderr)
        return None


def _own_sha256(description: Mapping[str, Any]) -> str:
    """Of the numbers beside a checkpoint's tensors, in whatever order they are."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def training_state(task: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and optimiser state as one flat dict of tensors, named by parameter."""
    tensors = {f"method.{name}": value for name, value in task.state_dict().items()}
    for name, parameter in task.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser.{name}:{key}"] = value
    for number, group in enumerate(optimiser.param_groups):
        if "step" in group:  # timm's LAMB counts there
            tensors[f"group.{number}"] = torch.as_tensor(group["step"])
    return tensors


def host_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same as they are now, in the memory of this process: what is written of them may go on beside the training."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def restore_state(task: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `training_state` took, in place."""
    weights = {k.removeprefix("method."): v for k, v in tensors.items() if k.startswith("method.")}
    task.load_state_dict(weights)
    optimiser.state.clear()
    parameters = dict(task.named_parameters())
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            name, _, kind = key.removeprefix("optimiser.").rpartition(":")
            parameter = parameters[name]
            # AdamW's step counts stay float32, whatever the weights are
            # a fused step goes through memory, so that what has a weight's shape must lie as it does
            like = parameter if value.shape == parameter.shape else value
            made = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
            optimiser.state[parameter][kind] = made.copy_(value)
        elif key.startswith("group."):
            optimiser.param_groups[int(key.removeprefix("group."))]["step"] = value.clone()


def environment() -> dict[str, Any]:
    """Versions, device, threads and the command line."""
    import lightning_fabric

    described = {
        "underpaint": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("torchvision", "timm")},
        "lightning-fabric": lightning_fabric.__version__,  # which lies in the package lightning, too
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    return described


def processor() -> str:
    """The name of the CPU where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
