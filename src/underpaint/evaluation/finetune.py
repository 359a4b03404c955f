"""Fine-tuning a whole encoder with a linear head: what it is worth as a start.

All of the recipe is timm's: layer-wise rates (`param_groups_layer_decay`), mixup and cutmix, RandAugment, random
erasing, label smoothing, drop path, the moving average, the schedule. Ours is only what lies between them.
"""

import copy
from collections.abc import Generator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import list_optimizers
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms.functional import to_pil_image

from underpaint.backbones import TokenBackbone
from underpaint.backbones.build import create_model, with_drop_path
from underpaint.backbones.swin import Swin
from underpaint.backbones.weights import fill
from underpaint.computing import full, lay_out, output
from underpaint.data import Batch, Crops, eval_batches, train_batches
from underpaint.errors import InputError
from underpaint.evaluation.base import Context, Kept, Row
from underpaint.evaluation.bundle import EncoderBundle
from underpaint.evaluation.choice import HELD, SHARE, Choice, choose, grid, settings_of
from underpaint.evaluation.classify import MAJORITY, Classification, Splits
from underpaint.evaluation.features import counted
from underpaint.evaluation.keep import Saved
from underpaint.evaluation.results import Probe
from underpaint.evaluation.settings import FineTuning, changed, fine_tuning
from underpaint.evaluation.splits import Split, hold_out, stratified
from underpaint.evaluation.trained import Learned, Task, train
from underpaint.train.optim import layerwise
from underpaint.train.schedules import Duration, Schedule


def classifier(bundle: EncoderBundle, classes: int, drop_path: float, head_scale: float) -> nn.Module:
    """timm's own network with a head on the exported feature (of a distilled DeiT two, on its tokens of class and
    distillation), started from the encoder's weights."""
    arguments = with_drop_path(copy.deepcopy(bundle.arguments) | {"num_classes": classes}, drop_path)
    model: Any = create_model(arguments)
    matched = fill(model, bundle.weights())
    found: Any = model.get_classifier()
    heads = [getattr(head, "fc", head) for head in (found if isinstance(found, tuple) else [found])]
    own = tuple(name for name, module in model.named_modules() if module in heads)
    left = [name for name in matched.untouched if not name.startswith(own)]
    if left:
        raise InputError(f"{bundle.name}: no weights for {', '.join(left[:3])} of the network to be fine-tuned")
    with torch.no_grad():
        for head in heads:
            head.weight.normal_(std=head_scale) if head_scale < 1 else None
            head.bias.zero_()
    return model


SMALL = 96  # pixels of a side: up to here the recipe for small images serves


def recipe_for(bundle: EncoderBundle, name: str | None, settings: Mapping[str, object]) -> FineTuning:
    """The recipe of this name, or the one that suits the encoder and its image size, with some settings changed.

    Raises:
        InputError: no such recipe or setting, or settings that do not go together.
    """
    if name is None:
        if min(bundle.size) <= SMALL:
            name = "small"
        elif isinstance(bundle.encoder, Swin):
            name = "localmim-swin-base"
        else:
            name = "mae-vit-base" if isinstance(bundle.encoder, TokenBackbone) else "rsb-a3"
    found = changed(fine_tuning(name), settings, FineTune.what)
    if (found.mixup or found.cutmix) and found.batch_size % 2:
        raise InputError(
            f"--set batch_size={found.batch_size}: an even number is needed where mixup and cutmix pair images (mixup=0 "
            "and cutmix=0 switch them off)"
        )
    if found.crop_scale[0] > found.crop_scale[1]:
        raise InputError(f"--set crop_scale={list(found.crop_scale)}: the lower share comes first")
    known = [str(name) for name in list_optimizers()]
    if found.optimiser not in known:
        raise InputError(f"--set optimiser={found.optimiser}: timm has {', '.join(known)}")
    return found


def duration_of(config: FineTuning, count: int, minutes: float | None) -> tuple[int, Duration]:
    """The batch of a training on so many images, and how long it lasts."""
    size = min(config.batch_size, max(2, count // 2 * 2))  # mixing pairs images, so a batch is even
    return size, Duration(max(1, round(config.epochs * count / size)), minutes)


class FineTuned(Task[Batch]):
    """A network with a head on class labels, and the moving average of its weights where one is kept."""

    def __init__(
        self,
        bundle: EncoderBundle,
        train: Split,
        config: FineTuning,
        context: Context,
        duration: Duration | None = None,
    ):
        """`duration`: that of the recipe, or the minutes of the call, where None.

        Raises InputError: weights that do not fit the network to be fine-tuned.
        """
        labels = np.unique(train.labels).tolist()
        size, own = duration_of(config, len(train.indices), context.options.minutes)
        network = classifier(bundle, len(labels), config.drop_path, config.head_scale).to(context.device)
        lay_out(network, context.device)
        schedule = Schedule(config.warmup, config.min_lr_ratio)
        super().__init__(network, size, duration or own, schedule)
        self.labels = {label: number for number, label in enumerate(labels)}
        self.average = ModelEmaV3(network, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        self.bundle, self.split, self.config = bundle, train, config
        self.clip = config.clip
        self.step = 0  # of the last loss
        mixes = config.mixup or config.cutmix
        self.mixing = (
            Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.smoothing,
                num_classes=len(labels),
            )
            if mixes
            else None
        )
        self.criterion = BinaryCrossEntropy(target_threshold=0.2) if config.binary else SoftTargetCrossEntropy()
        erasing = {"mode": "pixel", "max_count": 1, "device": str(context.device)}
        self.erase = RandomErasing(config.erasing, **erasing) if config.erasing else None

    @property
    def best(self) -> nn.Module:
        """What is judged and kept."""
        return self.network if self.average is None else self.average.module

    def optimiser(self) -> torch.optim.Optimizer:
        config = self.config
        return layerwise(
            self.network,
            config.optimiser,
            lr=config.lr * self.size / 256,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            betas=config.betas,
        )

    def batches(self, first: int, seed: int) -> Generator[Batch, None, None]:
        images, scale = self.split.images, self.config.crop_scale
        crops = Crops(images, self.bundle.size, self.size, seed, self.split.indices, scale)
        return train_batches(crops, first_batch=first, device=self.bundle.standardize.mean.device)

    def loss(self, batch: Batch, step: int) -> Float[Tensor, ""]:
        self.step = step
        wanted = [self.labels[label] for label in self.split.labels_of(batch.samples).tolist()]
        y = torch.tensor(wanted, device=batch.images.device)
        x = self.bundle.standardize(_augmented(batch.images, self.config.augment))
        if self.erase is not None:
            x = self.erase(x)
        if self.mixing is not None:
            x, y = self.mixing(x, y)
        else:
            y = _smooth(y, len(self.labels), self.config.smoothing)
        return self.criterion(full(self.network(x)), y)

    def after_step(self, progress: float, taken: Float[Tensor, ""]) -> None:
        if self.average is not None:
            self.average.update(self.network, step=self.step + 1)


class FineTune(Classification[FineTuning, nn.Module | None]):
    """The whole network trained, beside the same one from scratch (by the same recipe without layer decay)."""

    input = "images"
    Config = FineTuning
    what = "fine-tuning"
    asks = ("minutes",)

    def __init__(self, name: str, context: Context, data: Splits, config: FineTuning):
        """Raises InputError: fewer than two classes in train."""
        super().__init__(name, context, data, config)
        labels, _ = self.classes()
        if len(labels) < 2:
            raise InputError(f"fine-tuning needs at least 2 classes in train; there is only {labels[0]}")
        self.trained: dict[str, Learned] = {}
        self.choices: dict[str, Choice] = {}
        self.seen = self.test.indices

    @classmethod
    def configure(cls, context: Context) -> FineTuning:
        return recipe_for(context.bundle, context.options.recipe, context.options.settings)

    def rows(self) -> list[Row]:
        return [Row(who, who) for who in (*self.context.encoders, MAJORITY)]

    def fit(self, row: Row) -> nn.Module | None:
        if row.who == MAJORITY:
            return None
        bundle, minutes = self.context.encoders[row.who], self.context.options.minutes
        config, duration = self.config, None
        choice = self._chosen(row.name, bundle)
        if choice is not None and choice.tried:
            self.choices[row.name] = choice
            config = choice.config
            if minutes is not None:
                _, own = duration_of(config, len(self.train.indices), minutes)
                duration = replace(own, minutes=max(minutes * (1 - SHARE), minutes - choice.minutes))
        elif not bundle.trained:
            config = replace(config, layer_decay=1.0)  # from scratch every layer has all to learn
        torch.manual_seed(self.context.options.seed)
        task = FineTuned(bundle, self.train, config, self.context, duration)
        settings = {"trained": bundle.trained, "train": len(self.train.indices), **asdict(config)}
        self.trained[row.name] = train(task, self.context, self.folder / row.who, settings)
        return task.best.eval()

    def _chosen(self, name: str, bundle: EncoderBundle) -> Choice | None:
        """Rate and layer decay for a network, by a part of the training labels; None where the recipe was named, which is
        taken as it was published, or where there are too few labels."""
        options, seed = self.context.options, self.context.options.seed
        labels = self.train.labels
        fitted, held = hold_out(labels, seed)
        if options.recipe is not None or not len(held):
            return None
        held = held[stratified(labels[held], HELD, seed)]
        known, judges = (Split(self.train.images, np.asarray(self.train.indices)[part]) for part in (fitted, held))

        def tried(config: FineTuning, length: Duration, folder: Path) -> tuple[int, float, float]:
            torch.manual_seed(seed)
            task = FineTuned(bundle, known, config, self.context, length)
            settings = {"trained": bundle.trained, "train": len(known.indices), "held": len(held), **asdict(config)}
            trained = train(task, self.context, folder, settings)
            scores, seen = self._scores(bundle, task.best.eval(), judges, "choosing")
            wanted = torch.tensor([task.labels[label] for label in judges.labels_of(seen).tolist()])
            right = (scores.argmax(1) == wanted).double().mean()
            return trained["steps"], float(right), float(cross_entropy(scores, wanted))

        _, whole = duration_of(self.config, len(labels), options.minutes)
        settings = settings_of(self.config, trained=bundle.trained, train=len(labels), held=len(held), seed=seed)
        who = bundle.name if self.context.alone else name
        pairs = grid(self.config, options.settings)
        return choose(pairs, whole, tried, self.folder / name, settings, f"fine-tuning of {who}")

    @torch.no_grad()
    def _scores(
        self, bundle: EncoderBundle, model: nn.Module, split: Split, what: str
    ) -> tuple[Float[Tensor, "n k"], list[int]]:
        """What a network says of the images of a split, and which of them could be read."""
        scores, seen = [], []
        batches = eval_batches(split.images, size=bundle.size, indices=split.indices, device=self.context.device)
        for batch in counted(batches, what, len(split.indices)):
            scores.append(output(model, bundle.standardize(batch.images)).cpu())
            seen += batch.samples
        return torch.cat(scores), seen

    def predict(self, row: Row, model: nn.Module | None) -> Probe:
        if model is None:
            return self.majority().grouped(self.test.groups_of(self.seen))
        scores, seen = self._scores(self.context.encoders[row.who], model, self.test, "testing")
        self.seen, self.wanted = seen, self.test.labels_of(seen)
        found = np.array(self.classes()[0])[scores.argmax(1).numpy()]
        config = self.choices[row.name].config if row.name in self.choices else None
        chosen = {} if config is None else {"lr": config.lr, "layer_decay": config.layer_decay}
        return Probe.of(found == self.wanted, chosen, found, self.test.groups_of(seen))

    def beside(self, row: Row, found: Probe) -> dict[str, object]:
        choice = self.choices.get(row.name)
        return {**super().beside(row, found), **({"tried": choice.tried} if choice else {})}

    def details(self, found: Mapping[str, Probe]) -> dict[str, object]:
        return {**super().details(found), "trained": self.trained, "recipe": asdict(self.config)}

    def kept(self, row: Row, model: nn.Module | None) -> Kept | None:
        labels, names = self.classes()
        return None if model is None else Kept(model, names, {"labels": labels})

    @classmethod
    def rebuild(cls, saved: Saved, bundle: EncoderBundle) -> nn.Module:
        return create_model({**saved["create_model"], "num_classes": len(saved["classes"])})


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
