"""What a whole split's features say: retrieval recall both ways, and the contrastive loss among all pairs."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

# Rows of the similarity matrix that are there at once: the whole one of 25,000 captions would be 2.5 GB.
_ROWS = 1024


def recalls(
    images: Tensor, texts: Tensor, *, image_ids: Tensor, text_ids: Tensor, ks: Sequence[int]
) -> tuple[list[float], list[float]]:
    """(image→text, text→image) recall at each k, in percent.

    images, texts: (pairs, D) float32 of length 1; pairs of equal image_ids are one image with several captions,
    those of equal text_ids one caption under several images. A query is answered if one of its partners is among
    the k nearest candidates; of equally near ones the wrong ones come first, so that a model that tells nothing
    apart has recall 0. (torchmetrics' RetrievalHitRate says the same of flat lists, query by query in Python.)
    """
    images, image_of = _distinct(images, image_ids)
    texts, text_of = _distinct(texts, text_ids)
    to_text = _ranks(images, texts, image_of, text_of)
    to_image = _ranks(texts, images, text_of, image_of)
    return [_percent(to_text < k) for k in ks], [_percent(to_image < k) for k in ks]


def pair_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """0-d: CLIP's loss of all pairs (N, D), each against all others, in parts of the similarity matrix."""
    own = torch.arange(len(images), device=images.device)
    total = sum(
        cross_entropy(scale * queries[rows] @ candidates.T, own[rows], reduction="sum")
        for queries, candidates in ((images, texts), (texts, images))
        for rows in _parts(len(images))
    )
    return torch.as_tensor(total) / (2 * len(images))


def _distinct(features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Features of the first pair of each id, and of each pair which of these is its own."""
    found, own = ids.unique(return_inverse=True)
    positions = torch.arange(len(ids), device=ids.device)
    first = torch.full_like(found, len(ids)).scatter_reduce(0, own, positions, reduce="amin")
    return features[first], own


def _ranks(queries: Tensor, candidates: Tensor, query_of: Tensor, candidate_of: Tensor) -> Tensor:
    """(queries,) int64: how many wrong candidates are at least as near as the nearest right one."""
    found = []
    for rows in _parts(len(queries)):
        similar = queries[rows] @ candidates.T
        pairs = (query_of >= rows.start) & (query_of < rows.stop)
        right = torch.zeros_like(similar, dtype=torch.bool)
        right[query_of[pairs] - rows.start, candidate_of[pairs]] = True
        best = similar.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        # "not less": what is not a number is as near as can be, too.
        found.append((~(similar < best) & ~right).sum(dim=1))
    return torch.cat(found)


def _parts(total: int) -> Iterator[slice]:
    return (slice(first, min(first + _ROWS, total)) for first in range(0, total, _ROWS))


def _percent(answered: Tensor) -> float:
    return 100 * int(answered.sum()) / len(answered)
