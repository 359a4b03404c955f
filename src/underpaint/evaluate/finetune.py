"""Fine-tuning a whole encoder with a linear head: what it is worth as a start.

All of the recipe is timm's: layer-wise rates (`param_groups_layer_decay`), mixup and cutmix, RandAugment, random
erasing, label smoothing, drop path, the moving average, the schedule. Ours is only what lies between them.
"""

import copy
import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from jaxtyping import Float
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from underpaint.backbones import PatchBackbone
from underpaint.backbones.build import fill, with_drop_path
from underpaint.backbones.swin import Swin
from underpaint.console import say
from underpaint.data import Batch, eval_batches, train_batches
from underpaint.errors import InputError
from underpaint.evaluate.baselines import majority
from underpaint.evaluate.bundle import EncoderBundle
from underpaint.evaluate.frozen import classification
from underpaint.evaluate.keep import keep
from underpaint.evaluate.plots import confusion_picture
from underpaint.evaluate.result import Probe
from underpaint.evaluate.splits import Split
from underpaint.train.fit import Length, Schedule, changed, fit


@dataclass
class FineTuning:
    """A recipe. Defaults are MAE's for ViT-B (arXiv 2111.06377, table 9), which fit most ViTs.

    Attributes:
        lr: peak, per 256 images.
        layer_decay: rate of a layer over that of the layer above it; 1 for none.
        warmup: share of the run.
        min_lr_ratio: rate at the end, over the peak.
        augment: timm's name of a RandAugment policy, or none; 8-bit RGB images only.
        ema_decay: decay of the moving average of the weights that is judged; none where 0.
        binary: one binary loss a class in place of one softmax (RSB).
        head_scale: deviation of the head's first weights; 1 leaves them as timm made them.
    """

    epochs: float = 100.0
    batch_size: int = 1024
    lr: float = 5e-4
    optimiser: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    layer_decay: float = 0.65
    warmup: float = 0.05
    min_lr_ratio: float = 5e-4
    clip: float | None = None
    drop_path: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    erasing: float = 0.25
    augment: str | None = "rand-m9-mstd0.5-inc1"
    ema_decay: float = 0.0
    binary: bool = False
    head_scale: float = 2e-5
    crop_scale: tuple[float, float] = (0.08, 1.0)


# the four papers' and RSB's; batch sizes are the papers', `batch_size` given by the user scales the rate
FINE_TUNING: dict[str, Callable[[], FineTuning]] = {
    "mae-vit-base": FineTuning,
    "energy": lambda: FineTuning(lr=1e-3, layer_decay=0.75, cutmix=0.0, erasing=0.0, augment="rand-m9-mstd0.5"),
    "cae-vit-base": lambda: FineTuning(batch_size=4096, lr=5e-4, warmup=0.05, min_lr_ratio=1.25e-4),
    "localmim-vit-base": lambda: FineTuning(lr=5e-4, layer_decay=0.65, warmup=0.2, min_lr_ratio=5e-3),
    "localmim-swin-base": lambda: FineTuning(lr=1e-3, layer_decay=0.9, warmup=0.2, min_lr_ratio=6.25e-5),
    "rsb-a2": lambda: _rsb(300.0, 5e-3, 0.05, "rand-m7-mstd0.5-inc1"),
    "rsb-a3": lambda: _rsb(100.0, 8e-3, 0.0, "rand-m6-mstd0.5-inc1"),
    # ours, for small images on a laptop; no rate serves all (docs/evaluate.md)
    "small": lambda: FineTuning(
        batch_size=128,
        lr=1e-3,
        mixup=0.0,
        cutmix=0.0,
        erasing=0.0,
        augment=None,
        crop_scale=(0.4, 1.0),
        drop_path=0.0,
    ),
}


def _rsb(epochs: float, rate: float, drop_path: float, augment: str) -> FineTuning:
    """ResNet strikes back (arXiv 2110.00476, tables 2 and 3)."""
    return FineTuning(
        epochs=epochs,
        batch_size=2048,
        lr=rate / 8,
        optimiser="lamb",
        weight_decay=0.02,
        layer_decay=1.0,
        warmup=5 / epochs,
        min_lr_ratio=1e-6 / rate,
        drop_path=drop_path,
        mixup=0.1,
        smoothing=0.0,
        erasing=0.0,
        augment=augment,
        binary=True,
        head_scale=1.0,
    )


def classifier(bundle: EncoderBundle, classes: int, drop_path: float, head_scale: float) -> nn.Module:
    """timm's own network with a head on the exported feature, started from the encoder's weights."""
    arguments = with_drop_path(copy.deepcopy(bundle.arguments) | {"num_classes": classes}, drop_path)
    model: Any = timm.create_model(**arguments)
    matched = fill(model, bundle.weights())
    head: Any = model.get_classifier()
    own = tuple(name for name, module in model.named_modules() if module is head)
    left = [name for name in matched.untouched if not name.startswith(own)]
    if left:
        raise InputError(f"{bundle.name}: no weights for {', '.join(left[:3])} of the network to be fine-tuned")
    with torch.no_grad():
        head.weight.normal_(std=head_scale) if head_scale < 1 else None
        head.bias.zero_()
    return model


WORKERS = min(8, os.cpu_count() or 1)  # that decode, where images are not kept decoded
SMALL = 96  # pixels of a side: up to here the recipe for small images serves


def recipe_for(bundle: EncoderBundle, name: str | None, settings: Mapping[str, Any]) -> FineTuning:
    """The recipe of this name, or the one that suits the encoder and its image size, with some settings changed.

    Raises:
        InputError: no such recipe or setting.
    """
    if name is None:
        if min(bundle.size) <= SMALL:
            name = "small"
        elif isinstance(bundle.encoder, Swin):
            name = "localmim-swin-base"
        else:
            name = "mae-vit-base" if isinstance(bundle.encoder, PatchBackbone) else "rsb-a3"
    if name not in FINE_TUNING:
        raise InputError(f"--recipe {name}: for fine-tuning there are {', '.join(FINE_TUNING)}")
    return changed(FINE_TUNING[name](), settings, "fine-tuning")


class _Judged(nn.Module):
    """A network, and the moving average of its weights where one is kept: one module, so that both are in a checkpoint."""

    def __init__(self, network: nn.Module, decay: float):
        super().__init__()
        self.network = network
        self.average = ModelEmaV3(network, decay=decay, use_warmup=True) if decay else None

    @property
    def best(self) -> nn.Module:
        return self.network if self.average is None else self.average.module


def finetune(
    bundle: EncoderBundle,
    train: Split,
    test: Split,
    recipe: FineTuning,
    *,
    minutes: float | None,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """Train the whole network on `train` and judge it on `test`, beside the same one from scratch (by the same recipe
    without layer decay).

    Returns:
        What results.json holds: sizes, rows, gain over from scratch, steps.

    Raises:
        InputError: fewer than two classes in train; a batch that is empty, or odd where images are mixed.
    """
    if recipe.batch_size < 1 or ((recipe.mixup or recipe.cutmix) and recipe.batch_size % 2):
        raise InputError(
            f"--set batch_size={recipe.batch_size}: 1 or more are needed, and an even number where mixup and cutmix pair "
            "images (mixup=0 and cutmix=0 switch them off)"
        )
    bundles = {"encoder": bundle} | ({"untrained": bundle.random_init(seed)} if bundle.trained else {})
    rows: dict[str, Probe] = {}
    trained: dict[str, Any] = {}
    wanted = np.zeros(0, int)
    for who, one in bundles.items():
        # from scratch every layer has all to learn
        its = recipe if one.trained else replace(recipe, layer_decay=1.0)
        probe, model, trained[who], wanted = _train_one(one, train, test, its, minutes, seed, folder / who)
        rows[who] = probe
        say(f"{who}: fine-tuned {probe.accuracy:.3f} +- {probe.standard_error:.3f}")
        if who == "encoder":
            known = np.unique(train.labels).tolist()
            names = train.images.classes or []
            keep(
                folder,
                "finetune",
                one,
                model,
                [names[label] if label < len(names) else str(label) for label in known],
                labels=known,
            )
    rows["majority"] = majority(train.labels, wanted)
    result = classification(rows, wanted, {"train": len(train.indices), "test": len(wanted)}, train)
    said = rows["encoder"].said
    assert said is not None
    names = train.images.classes or []
    confusion_picture(
        wanted, said, lambda label: names[label] if label < len(names) else str(label), folder / "confusion.png"
    )
    return result | {"trained": trained, "recipe": asdict(recipe)}


def _train_one(
    bundle: EncoderBundle, train: Split, test: Split, recipe: FineTuning, minutes: float | None, seed: int, folder: Path
) -> tuple[Probe, nn.Module, dict[str, Any], np.ndarray]:
    labels = train.labels
    classes = np.unique(labels)
    if len(classes) < 2:
        raise InputError(f"fine-tuning needs at least 2 classes in train; there is only {classes[0]}")
    device = bundle.standardize.mean.device
    torch.manual_seed(seed)
    holder = _Judged(classifier(bundle, len(classes), recipe.drop_path, recipe.head_scale).to(device), recipe.ema_decay)
    model = holder.network
    # mixing pairs images, so a batch is even
    batch_size = min(recipe.batch_size, max(2, len(labels) // 2 * 2))
    optimiser = create_optimizer_v2(
        model,
        opt=recipe.optimiser,
        lr=recipe.lr * batch_size / 256,
        weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay if recipe.layer_decay < 1 else None,
        betas=recipe.betas,
    )
    mixing = None
    if recipe.mixup or recipe.cutmix:
        mixing = Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            label_smoothing=recipe.smoothing,
            num_classes=len(classes),
        )
    criterion = BinaryCrossEntropy(target_threshold=0.2) if recipe.binary else SoftTargetCrossEntropy()
    erase = RandomErasing(recipe.erasing, mode="pixel", max_count=1, device=str(device)) if recipe.erasing else None
    place = {label: number for number, label in enumerate(classes.tolist())}

    def batches(first: int) -> Generator[Batch, None, None]:
        return train_batches(
            train.images,
            size=bundle.size,
            batch_size=batch_size,
            seed=seed,
            indices=train.indices,
            first_batch=first,
            workers=0 if train.images.cached else WORKERS,
            crop_scale=recipe.crop_scale,
            device=device,
        )

    def loss_of(batch: Batch, step: int) -> Float[Tensor, ""]:
        if holder.average is not None and step:
            holder.average.update(model, step=step)  # the weights after the step before
        y = torch.tensor([place[label] for label in train.labels_of(batch.samples).tolist()], device=device)
        x = bundle.standardize(_augmented(batch.images, recipe.augment))
        if erase is not None:
            x = erase(x)
        if mixing is not None:
            x, y = mixing(x, y)
        else:
            y = _smooth(y, len(classes), recipe.smoothing)
        return criterion(model(x), y)

    trained = fit(
        holder,
        optimiser,
        batches,
        loss_of,
        folder=folder,
        length=Length(max(1, round(recipe.epochs * len(labels) / batch_size)), minutes),
        schedule=Schedule(recipe.warmup, recipe.min_lr_ratio),
        seed=seed,
        clip=recipe.clip,
        batch_size=batch_size,
        settings={
            "encoder": bundle.name,
            "trained": bundle.trained,
            "size": list(bundle.size),
            "seed": seed,
            "train": len(labels),
            **asdict(recipe),
        },
    )
    if holder.average is not None:
        holder.average.update(model, step=int(trained["steps"]))
    best = holder.best.eval()
    said, seen = [], []
    with torch.no_grad():
        for batch in eval_batches(test.images, size=bundle.size, indices=test.indices, device=device):
            said.append(best(bundle.standardize(batch.images)).argmax(1).cpu().numpy())
            seen += batch.samples
    wanted = test.labels_of(seen)
    found = classes[np.concatenate(said)]
    return Probe.of(found == wanted, {}, found, test.groups_of(seen)), best, trained, wanted


def _smooth(y: Tensor, classes: int, smoothing: float) -> Float[Tensor, "b k"]:
    off = smoothing / classes
    return torch.full((len(y), classes), off, device=y.device).scatter_(1, y.unsqueeze(1), 1 - smoothing + off)


def _augmented(images: Float[Tensor, "b c h w"], policy: str | None) -> Float[Tensor, "b c h w"]:
    """timm's RandAugment, image by image, on 8-bit RGB; it draws from Python's and numpy's generators."""
    if policy is None or images.shape[1] != 3:
        return images
    change = rand_augment_transform(policy, {"translate_const": max(1, round(0.45 * min(images.shape[2:])))})
    made = [np.array(change(to_pil_image(image))) for image in images.cpu()]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).to(images.device).float().div_(255)
