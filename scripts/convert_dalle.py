"""Turn the two published files of DALL-E's discrete VAE into one that Underpaint reads. Run it once, by hand.

    python scripts/convert_dalle.py encoder.pkl decoder.pkl dalle.safetensors

The authors' files (addresses: their repository, openai/DALL-E) are pickled modules, so reading them runs their code:
use files that you trust, in an environment that holds their package (`pip install DALL-E`). Underpaint itself never
reads a pickle; what this writes is tensors only.
"""

import sys
from pathlib import Path

import torch

from underpaint.tokenizers import DallE, save_tokenizer


def ours(theirs: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """Their names (blocks.group_2.block_1.res_path.conv_3.w) as ours."""
    found = {}
    for name, value in theirs.items():
        pieces = name.split(".")
        kind = {"w": "weight", "b": "bias"}[pieces[-1]]
        if pieces[1] == "input":
            place = "first" if part == "encoder" else "codebook"
        elif pieces[1] == "output":
            place = "logits" if part == "encoder" else "last"
        else:
            group, block = int(pieces[1].removeprefix("group_")) - 1, int(pieces[2].removeprefix("block_")) - 1
            inner = "identity" if pieces[3] == "id_path" else f"convs.{int(pieces[4].removeprefix('conv_')) - 1}"
            place = f"{part}.{group}.{block}.{inner}"
        found[f"{place}.{kind}"] = value.float()
    return found


def main() -> None:
    encoder, decoder, out = sys.argv[1:]
    weights = {}
    for file, part in ((encoder, "encoder"), (decoder, "decoder")):
        module = torch.load(file, map_location="cpu", weights_only=False)
        weights |= ours(module.state_dict(), part)
    tokenizer = DallE()
    tokenizer.load_state_dict({**weights, "shares": tokenizer.shares})  # counted where it is used
    save_tokenizer(tokenizer, Path(out))
    print(f"{out}: {sum(w.numel() for w in weights.values()) / 1e6:.1f} million numbers")


if __name__ == "__main__":
    main()
