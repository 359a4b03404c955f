"""Folders of weights: timm's, and underpaint's own."""

import copy
import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from underpaint.backbones import load_encoder, save_encoder
from underpaint.backbones.build import describe_encoder, write_weights
from underpaint.backbones.weights import is_run
from underpaint.evaluation.finetune import classifier
from underpaint.evaluation.frozen import Headed
from underpaint.evaluation.keep import keep
from underpaint.exporting.subject import Outputs, Subject, Written
from underpaint.files import write_json
from underpaint.prediction import rebuilt

CLOSE = 1e-4  # of the largest: so near is "the same" for the usage that a card shows


def timm_network(subject: Subject, to: str) -> Any:
    """timm's own network of a subject, with its head where it has one.

    Raises:
        InputError: what was trained is no network of timm's.
    """
    if subject.task == "encoder":
        return subject.bundle.encoder.model
    if subject.task == "finetune":
        return subject.network
    head: Any = getattr(subject.network, "head", None)
    if isinstance(subject.network, Headed) and not subject.network.of_patches:
        linear: nn.Linear = head.linear
        made: Any = classifier(subject.bundle, linear.out_features, 0.0, 1.0)
        own = made.get_classifier()
        own = getattr(own, "fc", own)
        if isinstance(own, nn.Linear):
            own.load_state_dict(linear.state_dict())
            return made.eval()
    raise subject.refused(to, f"what '{subject.task}' trains is no network of {to}'s own")


def write_timm(subject: Subject, folder: Path) -> Written:
    """`model.safetensors` and `config.json` as timm reads them from a folder or the hub."""
    network = timm_network(subject, "timm")
    arguments = copy.deepcopy(subject.bundle.arguments)
    name, classes = arguments.pop("model_name"), network.num_classes
    arguments.pop("num_classes", None)
    known: dict[str, Any] = dict(getattr(network, "pretrained_cfg", None) or {})
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": classes,
        "num_features": network.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "underpaint",
            "custom_load": False,
            "input_size": [len(subject.mean), *subject.size],
            "fixed_input_size": "img_size" in arguments,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": subject.mean,
            "std": subject.std,
            "num_classes": classes,
            # by these it knows what to leave out where the number of classes or channels is another
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
        },
    }
    if subject.classes:
        config["label_names"] = subject.classes
    write_weights(folder / "model.safetensors", network.state_dict())
    write_json(folder / "config.json", config)
    made: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    normed = getattr(subject.bundle.encoder, "normed", True)

    def read(images: Tensor) -> Outputs:
        standard = subject.bundle.standardize(images)
        if subject.task != "encoder":
            return {subject.names[0]: made(standard)}
        maps = made.forward_intermediates(standard, indices=1, norm=normed, intermediates_only=True)[-1]
        patches = maps.flatten(2).transpose(1, 2)
        return {"pooled": patches.mean(1), "patches": patches}

    return Written(read, _timm_usage(subject, made, normed), {"timm": timm.__version__})


def _timm_usage(subject: Subject, made: Any, normed: bool) -> str:
    begin = (
        "import timm\n\n"
        'model = timm.create_model("local-dir:PATH", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        "images = transform(image)[None]\n"
    )
    if subject.task != "encoder":
        return begin + f"{subject.names[0]} = model(images)\n"
    with torch.no_grad():
        tried = torch.rand(2, len(subject.mean), *subject.size)
        feature, said = subject.bundle.encoder(tried).pooled, made(tried)
        same = feature.shape == said.shape and (feature - said).abs().max() <= CLOSE * feature.abs().max()
    taken = f"model.forward_intermediates(images, indices=1, norm={normed}, intermediates_only=True)[-1]"
    if same:
        return begin + f"feature = model(images)\nmap = {taken}\n"
    return begin + f"map = {taken}\nfeature = map.mean((2, 3))\n"


def write_own(subject: Subject, folder: Path) -> Written:
    """As a run or an evaluation keeps it: `load_encoder` and `evaluate`, or `predict`, take the folder."""
    bundle = subject.bundle
    if subject.saved is None:
        described = describe_encoder(subject.name) if is_run(Path(subject.name)) else {}
        provenance = {name: described.get(name) for name in ("start", "trained_on")}
        save_encoder(folder, bundle.encoder, bundle.arguments, bundle.standardize, bundle.scaling, provenance)
        read_back = load_encoder(folder)

        def read(images: Tensor) -> Outputs:
            found = read_back(bundle.standardize(images))
            return {"pooled": found.pooled, "patches": found.patches}

        usage = (
            'import underpaint\n\nencoder = underpaint.load_encoder("PATH")\n'
            "features = encoder(encoder.transform([image]))  # features.pooled, features.patches\n"
        )
        return Written(read, usage, {})
    rest = {name: value for name, value in json.loads(json.dumps(subject.saved)).items() if name not in NAMED}
    keep(folder, subject.task, bundle, subject.network, subject.classes, rest)
    described = json.loads((folder / "model.json").read_text())
    write_json(
        folder / "model.json", {**described, "encoder": bundle.arguments["model_name"]}
    )  # no path of this machine
    _, _, again, network = rebuilt(folder)
    network.cpu()
    again.standardize.cpu()

    def read_model(images: Tensor) -> Outputs:
        from_files = copy.copy(subject)
        object.__setattr__(from_files, "network", network)
        return from_files.outputs(images)

    usage = "import underpaint\n\nunderpaint.predict('PATH', 'photos/', 'predicted')\n"
    return Written(read_model, usage, {})


# what `keep` writes itself
NAMED = ("format", "task", "encoder", "create_model", "mean", "std", "scaling", "image_size", "classes")
