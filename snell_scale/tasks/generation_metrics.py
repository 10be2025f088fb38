"""How close generated images are to real ones: FID, KID, similarities, and whether they show what was asked."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from snell_scale.interfaces import Ranks
from snell_scale.tasks.feature_backends import FeatureBackendConfig, FeatureModel

_KID_SUBSET_SIZE = 1000
_KID_SUBSETS = 100


class GenerationMetrics:
    """Takes in generated and real images batch by batch, each rank its part; gives metrics of all of them.

    fid, clip, dino: the backends of FID, KID and recognised samples; of CLIP-I and CLIP-T; of DINO similarity.
    """

    def __init__(
        self,
        fid: FeatureBackendConfig | None,
        clip: FeatureBackendConfig | None,
        dino: FeatureBackendConfig | None,
        *,
        device: torch.device,
    ) -> None:
        self._device = device
        named = {"fid": fid, "clip": clip, "dino": dino}
        self._models: dict[str, FeatureModel] = {
            name: backend.load(device) for name, backend in named.items() if backend is not None
        }
        self._parts: dict[str, dict[int, dict[str, Tensor]]] = {"real": {}, "generated": {}}

    def add_real(self, number: int, images: Tensor, *, prompts: Tensor) -> None:
        """Batch `number` of the real images: (B, 3, H, W) uint8, with the (B,) id of each one's prompt."""
        self._parts["real"][number] = self._features(images) | {"prompt": prompts}

    def add_generated(
        self, number: int, images: Tensor, *, prompts: Tensor, texts: Sequence[str], classes: Sequence[str] | None
    ) -> None:
        """Batch `number` of the generated ones. texts: what was asked; classes: the classes' names, if known."""
        found = self._features(images) | {"prompt": prompts}
        clip = self._models.get("clip")
        if clip is not None and clip.texts is not None:
            found["text_match"] = (normalize(found["clip"]) * normalize(clip.texts(texts).cpu())).sum(dim=1)
        fid = self._models.get("fid")
        if fid is not None and fid.logits is not None and classes is not None:
            asked = torch.tensor([fid.class_names.index(name) for name in classes])
            found["recognised"] = fid.logits(images).argmax(dim=1).cpu() == asked
        self._parts["generated"][number] = found

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(self._device.type, enabled=False):  # the numbers of runs in other precisions compare
            return {name: model.features(images).cpu() for name, model in self._models.items()}

    def metrics(self, ranks: Ranks) -> dict[str, float]:
        """The metrics of all ranks' images, computed on rank 0; every rank calls it and gets the same."""
        everyone = ranks.gather(self._parts)
        return ranks.first(
            lambda: _metrics(
                _joined([parts["real"] for parts in everyone]),
                _joined([parts["generated"] for parts in everyone]),
            )
        )


def check_enough_images(number: int, *, split: str) -> None:
    """ValueError where a split has too few images for FID and KID, which compare spreads."""
    if number < 2:
        raise ValueError(
            f"task.fid_backend: FID and KID take at least 2 real images, but the {split} split has {number}; "
            "hold out more, set task.reference=train, or set task.fid_backend=null"
        )


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """FID (Heusel et al., arXiv 1706.08500): of normal distributions with the features' means and covariances.

    real, generated: (N, D). By torchmetrics, which is told not to reduce over ranks by itself: the features are
    those of all ranks. With fewer samples than features it is finite but far above its limit.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Features(real.shape[1]), sync_on_compute=False)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


def kernel_distance(real: Tensor, generated: Tensor) -> float:
    """KID (Binkowski et al., arXiv 1801.01401): unbiased squared MMD under the kernel (x·y/D + 1)³.

    real, generated: (N, D). By torchmetrics, whose estimate takes as many of one as of the other: all of the
    smaller set up to 1000, or the mean over 100 random subsets of that size; always the same ones, where
    torchmetrics draws from the global stream of random numbers.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(real), len(generated), _KID_SUBSET_SIZE)
    whole = size == len(real) == len(generated)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features, which are here already
        torch.manual_seed(0)
        metric = KernelInceptionDistance(
            feature=_Features(real.shape[1]),
            subsets=1 if whole else _KID_SUBSETS,
            subset_size=size,
            sync_on_compute=False,
        )
        metric.update(real.double(), real=True)
        metric.update(generated.double(), real=False)
        return float(metric.compute()[0])


def mean_similarity(real: Tensor, generated: Tensor, *, real_prompts: Tensor, generated_prompts: Tensor) -> float:
    """Mean cosine over all pairs of a generated and a real image with the same prompt (arXiv 2208.12242, 4.1).

    NaN where no prompt has both.
    """
    cosines = normalize(generated.double()) @ normalize(real.double()).T
    pairs = generated_prompts.unsqueeze(1) == real_prompts
    return float(cosines[pairs].mean())


def _metrics(real: Mapping[str, Tensor], generated: Mapping[str, Tensor]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    if "fid" in real:
        metrics["fid"] = frechet_distance(real["fid"], generated["fid"])
        metrics["kid"] = 1000 * kernel_distance(real["fid"], generated["fid"])
    if "recognised" in generated:
        metrics["sample_accuracy"] = 100 * float(generated["recognised"].double().mean())
    prompts = {"real_prompts": real["prompt"], "generated_prompts": generated["prompt"]}
    for backend, name in (("clip", "clip_i"), ("dino", "dino")):
        if backend in real:
            metrics[name] = mean_similarity(real[backend], generated[backend], **prompts)
    if "text_match" in generated:
        metrics["clip_t"] = float(generated["text_match"].double().mean())
    return metrics


def _joined(of_ranks: Sequence[Mapping[int, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The batches of all ranks in order: the same tensors, whatever rank had which."""
    batches = {number: batch for parts in of_ranks for number, batch in parts.items()}
    ordered = [batches[number] for number in sorted(batches)]
    return {name: torch.cat([batch[name] for batch in ordered]) for name in ordered[0]}


class _Features(nn.Module):
    """Stands where torchmetrics has its feature extractor: it is given features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
