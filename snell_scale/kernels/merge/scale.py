"""The coefficient c of the distance kernel that starts a layer like the authors' own; derived in README.md."""

import math

# github.com/ssfgunner/SNELL @ e9d5185: ViT-B/16, rank 32, two components, every coefficient 0.1.
AUTHORS_SCALE = 0.1
AUTHORS_FEATURES = 768
AUTHORS_RANK = 32
AUTHORS_COMPONENTS = 2


def auto_scale(in_features: int, out_features: int, rank: int, num_components: int) -> float:
    """c for which K starts with the RMS that the authors' c = 0.1 gives at 768 x 768, rank 32, H = 2.

    For factors as initialised, A ~ U(±1/√(in·r/H)) and B ~ U(±1/√(out·r/H)). out_features is that of one matrix
    of a fused group; in_features of a convolution is in·kh·kw. For even H equal RMS of K means equal RMS of ΔW
    under every weighting, the distribution of K being much the same. For odd H the mean distance does not
    cancel, K is not centred, and only E K² is equal.
    """
    for name, value in (("in_features", in_features), ("out_features", out_features), ("rank", rank)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected a positive number")
    if num_components < 1 or rank % num_components:
        raise ValueError(
            f"rank {rank} with {num_components} components; expected a rank divisible by the number of components"
        )
    authors = _mean_square_of_sum(AUTHORS_FEATURES, AUTHORS_FEATURES, AUTHORS_RANK, AUTHORS_COMPONENTS)
    return AUTHORS_SCALE * math.sqrt(
        authors / _mean_square_of_sum(in_features, out_features, rank, num_components)
    )


def _mean_square_of_sum(in_features: int, out_features: int, rank: int, num_components: int) -> float:
    """E (Σ_h (−1)^h d_h)² to first order in H/r."""
    from_A, from_B = 1 / in_features, 1 / out_features
    mean_square = (from_A + from_B) / 3
    # Kurtosis − 1 of the difference of two uniforms: 1.4 if they are equally wide, 0.8 if one is negligible.
    spread = 2 - 1.2 * (from_A**2 + from_B**2) / (from_A + from_B) ** 2
    variance = mean_square * spread * num_components / (4 * rank)
    surplus = mean_square - variance if num_components % 2 else 0.0
    return num_components * variance + surplus
