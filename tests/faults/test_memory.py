"""Memory that runs out: the same step in more and smaller parts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from underpaint.cli import main
from underpaint.methods import METHODS
from underpaint.prepare import _parts
from underpaint.recipes.recipe import checked
from underpaint.train.loop import Training
from underpaint.train.run_folder import Run
from underpaint.train.speed import out_of_memory
from underpaint.trainable import Objective

COMMAND = "--method energy --encoder vit_tiny_patch16_224 --image-size 16 --patch-size 8 --steps 12 --batch-size 16 "
COMMAND += "--checkpoint-every 2 --set encoder.embed_dim=24 --set encoder.depth=2 --set encoder.num_heads=2 --set run.log_every=1"


def limited(monkeypatch: Any, most: int, after: int) -> list[int]:
    """The energy method takes at most so many images at once, always or after some steps of the training; returns the sizes
    of all that it took since."""
    real, train = METHODS["energy"].forward, Training.train
    sizes: list[int] = []
    left = [after]

    def greedy(self: Any, images: torch.Tensor, *rest: Any) -> Objective:
        if not left[0]:
            if len(images) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            sizes.append(len(images))
        elif training:
            left[0] -= 1
        return real(self, images, *rest)

    training: list[bool] = []

    def begun(self: Any, *arguments: Any) -> Any:
        training.append(True)
        return train(self, *arguments)

    monkeypatch.setattr(METHODS["energy"], "forward", greedy)
    monkeypatch.setattr(Training, "train", begun)
    return sizes


def trained(pictures: Path, out: Path) -> dict[str, torch.Tensor]:
    assert main(["pretrain", str(pictures), "--out", str(out), *COMMAND.split()]) == 0
    return load_file(out / "encoder.safetensors")


@pytest.mark.parametrize(("most", "after", "parts"), [(5, 0, 4), (8, 3, 2)])
def test_a_step_is_the_same_in_the_parts_that_memory_asks_for(
    most: int, after: int, parts: int, pictures: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    whole = trained(pictures, tmp_path / "whole")
    capsys.readouterr()
    sizes = limited(monkeypatch, most, after)
    divided = trained(pictures, tmp_path / "divided")
    assert max(sizes) <= most
    said = capsys.readouterr().out
    assert f"in {parts} parts" in said
    assert ("out of memory; from here on" in said) == (after > 0)  # in the middle of training, or measured before it
    assert Run(tmp_path / "divided").recipe().measured["accumulation"] == parts
    assert Run(tmp_path / "divided").recipe().optimiser.batch_size == 16
    lines = [Run(tmp_path / name).lines("metrics.jsonl")[1:] for name in ("whole", "divided")]
    for name in (
        "loss",
        "gradient_norm",
    ):  # sums of float32 in another order; of half the images they differ by percents
        theirs, ours = (torch.tensor([line[name] for line in each]) for each in lines)
        assert len(ours) == 12
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    for name, value in whole.items():
        torch.testing.assert_close(divided[name], value, rtol=1e-3, atol=1e-5)
    assert (
        main(["pretrain", str(pictures), "--out", str(tmp_path / "divided"), *COMMAND.split()]) == 0
    )  # its own settings


@pytest.mark.quick
@pytest.mark.parametrize(
    ("asked", "measured", "local_batch", "parts"), [(1, None, 24, 1), (1, 8, 24, 8), (1, 8, 12, 12), (2, 24, 6, 6)]
)
def test_every_image_is_in_a_part_with_another_number_of_processes_too(
    asked: int, measured: int | None, local_batch: int, parts: int
) -> None:
    recipe = checked({"optimiser": {"batch_size": 24, "accumulation": asked}})
    if measured is not None:
        recipe.measured["accumulation"] = measured
    assert _parts(recipe, 24 // local_batch) == parts


@pytest.mark.quick
@pytest.mark.parametrize(
    ("before", "had", "now", "parts"),
    [(4, 1, 2, 2), (2, 2, 1, 4), (1, 4, 4, 1), (1, 4, 8, 1), (3, 1, 2, 2), (2, 3, 3, 2)],
)
def test_as_many_images_are_computed_at_once_with_another_number_of_processes(
    before: int, had: int, now: int, parts: int
) -> None:
    recipe = checked({"optimiser": {"batch_size": 96, "accumulation": 1}})
    recipe.measured |= {"accumulation": had, "processes": before}
    assert _parts(recipe, now) == parts


@pytest.mark.parametrize(("after", "status"), [(0, 2), (3, 3)])
def test_one_image_that_does_not_fit_ends_the_run_with_a_line(
    after: int, status: int, pictures: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    limited(monkeypatch, 0, after)
    assert main(["pretrain", str(pictures), "--out", str(tmp_path / "run"), *COMMAND.split()]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "a smaller encoder or image size is needed" in error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("NCCL Error 1: unhandled cuda error: Cuda failure 'out of memory'"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError(
            "NCCL error in: NCCLUtils.cpp:76, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.20.5\n"
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc 67108864 bytes"
        ),
        RuntimeError("ncclInternalError: Internal check failed.\nLast error:\nFailed to CUDA calloc async 1920 bytes"),
        RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":830'),
        MemoryError(),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception) -> None:
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"))
