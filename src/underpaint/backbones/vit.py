"""timm's plain vision transformers as token backbones."""

from timm.models.vision_transformer import VisionTransformer

from underpaint.backbones.plain import Plain


class ViT(Plain):
    """An adapter around timm's VisionTransformer (any name and size) whose positions are learned and added to its tokens."""

    def __init__(self, model: VisionTransformer, image_size: tuple[int, int] | None = None):
        if model.pos_embed is None:
            raise ValueError("this vision transformer lacks learned positions")
        super().__init__(model, image_size)
