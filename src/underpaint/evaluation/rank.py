"""How many directions features use: a number that needs no labels."""

import torch
from jaxtyping import Float
from torch import Tensor


def effective_rank(features: Float[Tensor, "n d"]) -> float:
    """RankMe (arXiv 2210.02885): exp of the entropy of the singular values, divided by their sum.

    Between 1 (all features on one line through 0) and min(n, d) (all directions alike); 0 for features that are all 0.
    Features are not centred, as in the paper.
    """
    x = features.double()
    # eigenvalues of the smaller Gram matrix are the squared singular values, at a fraction of the cost
    gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = singular.sum()
    if not total > 0:
        return 0.0
    share = singular / total
    return float(torch.special.entr(share).sum().exp())
