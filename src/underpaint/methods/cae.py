"""CAE: Chen et al., "Context Autoencoder for Self-Supervised Representation Learning", IJCV 2023, arXiv 2202.03026.

The encoder makes representations, and is kept from the pretext task: what is predicted of hidden patches is predicted
in the encoder's own space by a regressor, and only then turned into visual words by a decoder.

    Z_v = encoder(visible patches)
    T_m = encoder(hidden patches), without gradient                       the alignment target
    m   = mask tokens; a few times:  w = norm(m + cross-attention(m, [Z_v; m])),  m = w + MLP(w)
    Z_m = norm(m)
    Y   = words(decoder(Z_m))                                             hidden patches alone
    loss = cross-entropy(Y, words of hidden patches) + 2 * mean (Z_m - T_m)^2

There is one encoder and no moving average: the target is what the encoder itself makes of the hidden patches.
"""

from dataclasses import field
from typing import Literal

import torch
from jaxtyping import Float, Int
from timm.layers import LayerNorm, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from underpaint.backbones import TokenBackbone
from underpaint.blocks import heads_for, recomputing, sincos_positions, xavier
from underpaint.masking import Mask
from underpaint.methods.masked import MaskedMethod
from underpaint.methods.method import Objective
from underpaint.methods.words import WordMethod, word_terms
from underpaint.patches import Standardize, patchify, put, take, unpatchify, unstandardize
from underpaint.targets import Pixels
from underpaint.tokenizers import Tokenizer


class Regress(nn.Module):
    """One block of the regressor: queries are hidden places, keys and values visible and hidden ones.

    Positions go into queries and keys only, before their norms, and never into values. The residual of the second half
    starts from the normalised stream, as in the official code.
    """

    def __init__(self, dim: int, heads: int, gamma: float):
        super().__init__()
        self.heads = heads
        self.norm_query, self.norm_key, self.norm_value, self.norm = (LayerNorm(dim) for _ in range(4))
        self.query, self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((dim,), gamma)) for _ in range(2))

    def forward(
        self,
        hidden: Float[Tensor, "b h d"],
        visible: Float[Tensor, "b v d"],
        hidden_places: Float[Tensor, "b h d"],
        visible_places: Float[Tensor, "b v d"],
    ) -> Float[Tensor, "b h d"]:
        placed = hidden + hidden_places
        query = self._split(self.query(self.norm_query(placed)))
        # norms are per token, so visible and hidden halves are joined only after them
        keys = torch.cat([self.norm_key(visible + visible_places), self.norm_key(placed)], dim=1)
        values = torch.cat([self.norm_value(visible), self.norm_value(hidden)], dim=1)
        found = F.scaled_dot_product_attention(query, self._split(self.key(keys)), self._split(self.value(values)))
        stream = self.norm(hidden + self.gamma1 * self.out(found.transpose(1, 2).flatten(2)))
        return stream + self.gamma2 * self.mlp(stream)

    def _split(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b heads t e"]:
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


class CAE(WordMethod):
    """Predict the encoder's representation of hidden patches, and their words from that.

    >>> import torch, underpaint
    >>> from underpaint.tokenizers import sample_patches
    >>> cae = underpaint.CAE(underpaint.encoder("vit_tiny_patch16_224", image_size=64), codebook_size=16)
    >>> cae.tokenizer.fit(sample_patches([torch.rand(64, 3, 64, 64)], 16, 1024, seed=0))  # a run does this by itself
    >>> objective = cae(torch.rand(2, 3, 64, 64))
    >>> objective.loss.backward(); sorted(objective.terms)
    ['accuracy', 'alignment', 'baseline', 'target_std', 'words']

    Args:
        encoder: a plain ViT; the paper's have `init_values=0.1` (LayerScale).
        mask_ratio: share of the patches that is hidden (0.5 in the paper: 98 of 196).
        mask: a name of `masking.MASKS` (BEiT's blocks), or such a function.
        mask_patch_size: pixels of a side of what is hidden as one; a patch where None.
        target: words, or pixels: each hidden patch standardised, the control.
        tokenizer: a file of `underpaint tokenizer`; k-means over the training images' patches where None.
        codebook_size: words of that k-means: 1024 for images up to 64 px, 2048 above, where None.
        regressor_depth, decoder_depth: blocks; 4 in the paper, a third of the encoder's where None.
        alignment: weight of the alignment (2 in the paper); 0 switches it off.
        decoder: where off, words are read from the regressor's output directly.
        gamma: start of the LayerScale of regressor and decoder (0.1 for Base, 1e-5 for Large).

    Raises:
        TypeError: an encoder of another kind.
        ValueError: patches that are not square; a tokenizer that does not fit the encoder.
    """

    encoder: TokenBackbone
    mask_ratio: float = 0.5
    target: Literal["words", "pixels"] = "words"
    regressor_depth: int | None = None
    decoder_depth: int | None = None
    alignment: float = 2.0
    decoder: bool = True
    gamma: float = 0.1
    positions: Tensor = field(init=False)  # a buffer

    def __post_init__(self) -> None:
        encoder, gamma = self.encoder, self.gamma
        if not isinstance(encoder, TokenBackbone):
            raise TypeError(
                "CAE needs a plain transformer, whose output for hidden patches alone is the alignment target; "
                f"{type(encoder).__name__} makes none of places that it sees apart from their surroundings"
            )
        super().__post_init__()
        grid, dim = encoder.grid(*encoder.image_size), encoder.dim
        heads = heads_for(dim)
        for name, depth in (("regressor_depth", self.regressor_depth), ("decoder_depth", self.decoder_depth)):
            if depth is not None and depth < 1:
                raise ValueError(
                    f"{name} is {depth}; at least 1 block is needed (decoder: false leaves the decoder out)"
                )
        if gamma <= 0:
            raise ValueError(f"gamma is {gamma}; LayerScale starts above 0, 1 starts as if there were none")
        self.wanted = Pixels()
        self.register_buffer("positions", sincos_positions(grid, dim), persistent=False)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        third = max(2, encoder.depth // 3)
        self.regressor = nn.ModuleList(Regress(dim, heads, gamma) for _ in range(self.regressor_depth or third))
        self.norm = LayerNorm(dim)
        depth = (self.decoder_depth or third) if self.decoder else 0
        self.blocks = nn.ModuleList(
            Block(dim, heads, qkv_bias=True, init_values=gamma, norm_layer=LayerNorm) for _ in range(depth)
        )
        pixels = self.wanted.width(encoder.patch_size[0], encoder.channels)
        outputs = self.tokenizer.codebook_size if self.target == "words" else pixels
        self.head = nn.Sequential(LayerNorm(dim), nn.Linear(dim, outputs))
        for part in (self.regressor, self.blocks, self.head):
            part.apply(xavier)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def prepare(self, standardize: Standardize) -> Tokenizer | None:
        words = super().prepare(standardize)
        return words if self.target == "words" else None

    # --- the parts, in order ---------------------------------------------------------------------------------------

    def encode(self, tokens: Float[Tensor, "b n d"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        """The representation of some patches, from those alone."""
        return self.encoder.encode(take(tokens, index), index).tokens

    def regress(self, visible: Float[Tensor, "b v d"], mask: Mask) -> Float[Tensor, "b h d"]:
        """The representation of the hidden patches, from that of the visible ones, which stays as it is."""
        positions = self.positions.expand(len(visible), -1, -1)
        hidden_places, visible_places = take(positions, mask.hidden), take(positions, mask.visible)
        hidden = self.mask_token.to(visible.dtype).expand(len(visible), mask.hidden.shape[1], -1)
        for block in self.regressor:
            hidden = recomputing(self, block, hidden, visible, hidden_places, visible_places)
        return self.norm(hidden)

    def decode(self, latent: Float[Tensor, "b k d"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k o"]:
        """Words or pixels from representations, which see each other and nothing else."""
        tokens = latent
        if len(self.blocks):
            tokens = latent + take(self.positions.expand(len(latent), -1, -1), index)
        for block in self.blocks:
            tokens = recomputing(self, block, tokens)
        return self.head(tokens).float()

    def predict(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Float[Tensor, "b h o"]:
        tokens = self.encoder.embed(images, mask.visible)
        return self.decode(self.regress(self.encoder.encode(tokens, mask.visible).tokens, mask), mask.hidden)

    @torch.no_grad()
    def aligned_to(self, tokens: Float[Tensor, "b n d"], mask: Mask) -> Float[Tensor, "b h d"]:
        """The alignment target: the encoder's own view of the hidden patches; no drop path."""
        was = self.encoder.training
        self.encoder.eval()
        target = self.encode(tokens, mask.hidden).float()
        self.encoder.train(was)
        return target

    # --- the loss --------------------------------------------------------------------------------------------------

    def targets(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Tensor:
        if self.target == "words":
            return super().targets(images, mask)
        return take(self.wanted(images, self.encoder.patch_size[:1])[0].flatten(2).transpose(1, 2), mask.hidden)

    def forward(self, images: Float[Tensor, "b c height width"], noise: Mask | None = None) -> Objective:
        mask = self.sample_for(images) if noise is None else noise
        tokens = self.encoder.embed(images)  # one embedding feeds both passes
        latent = self.regress(self.encode(tokens, mask.visible), mask)
        decoded = self.decode(latent, mask.hidden)
        wanted = self.targets(images, mask)
        if self.target == "words":
            loss, terms = word_terms(decoded, wanted, self.tokenizer.shares)
        else:
            loss = (decoded - wanted).square().mean()
            terms = {"pixels": loss.detach(), "baseline": wanted.square().mean().detach()}
        if self.alignment:
            target = self.aligned_to(tokens.detach(), mask)
            error = (latent.float() - target).square().mean()
            spread = (target - target.mean((0, 1))).square().mean()
            loss = loss + self.alignment * error
            terms |= {
                "alignment": error.detach(),
                "target_std": spread.sqrt(),  # near 0 where representations have collapsed
                "baseline": terms["baseline"] + self.alignment * spread,
            }
        return Objective(loss, terms)

    # --- pictures and errors ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(
        self, images: Float[Tensor, "b c height width"], noise: Mask | None = None, task: str | None = None
    ) -> dict[str, Tensor]:
        """Also what the decoder makes of the encoder's own view of all patches: a picture only where regressed and
        encoded representations live in one space."""
        mask = self.fixed_noise(images, 1)[0] if noise is None else noise
        everything = torch.arange(self.positions.shape[0], device=images.device).expand(len(images), -1)
        own = self.decode(self.encoder(images).patches, everything)
        if self.target == "words":
            frames = super().restore(images, mask)
            return {**frames, "from its own\nrepresentation": self.spoken(images, own.argmax(-1))}
        grid = self.encoder.grid(*images.shape[-2:])
        patches = patchify(images, self.encoder.patch_size)
        found = unstandardize(self.predict(images, mask), take(patches, mask.hidden))
        return {
            "original": images,
            "hidden": self.hidden(images, mask),
            "restored": unpatchify(put(patches, mask.hidden, found), self.encoder.patch_size, grid),
            "from its own\nrepresentation": unpatchify(unstandardize(own, patches), self.encoder.patch_size, grid),
        }

    def errors(self, images: Float[Tensor, "b c height width"], noise: Mask) -> dict[str, tuple[Tensor, Tensor]]:
        words = self.target == "words"
        return super().errors(images, noise) if words else MaskedMethod.errors(self, images, noise)
