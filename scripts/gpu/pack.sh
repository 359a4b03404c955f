#!/usr/bin/env bash
# What a bare GPU machine without a network lacks, in one folder to carry along (at most 64 MiB): wheels of what it has not
# (it has torch, torchvision, timm, lightning and scikit-image), and a few images.
#
#   scripts/gpu/pack.sh [CIFAR10] [PACK]      a folder with train.parquet and test.parquet; PACK is .gpu-pack
#
# PYTHON_VERSION (3.12) is that of the machine's Python.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=${1:-} pack=${2:-.gpu-pack} version=${PYTHON_VERSION:-3.12}
missing=(beartype einx faster-coco-eval frozendict jaxtyping jsonargparse lightning-fabric loguru
    segmentation-models-pytorch torch-einops-utils vector-quantize-pytorch wadler-lindig imagecodecs)
rm -rf "$pack" && mkdir -p "$pack/wheels" "$pack/data"
.venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$version" \
    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any --constraint constraints.txt \
    --dest "$pack/wheels" "${missing[@]}"
if [ -n "$data" ]; then cp "$data/train.parquet" "$data/test.parquet" "$pack/data"; fi
size=$(du -sm "$pack" | cut -f1)
echo "$pack: $size MiB"
[ "$size" -le 64 ]
