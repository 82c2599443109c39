"""How different the pictures of one prompt are: what few-step students lose first, and what neither CLIP score nor preference sees.

    dino_cos    mean over pairs i < j of 1 - cos(f_i, f_j); the name is of the features it is fed, DINOv2 or another network
    vendi       exp(-sum lambda ln lambda), lambda the eigenvalues of the cosine kernel / M       Friedman and Dieng, 2023, arXiv:2210.02410
    lpips       mean over pairs of LPIPS (AlexNet)                                                Zhang et al., 2018, arXiv:1801.03924

Every measure gives one value a prompt, of P prompts with the same M seeds each. Their mean and its error are `metrics.bootstrap_mean`,
the ratio to a teacher under the same prompts and as many seeds `metrics.bootstrap_ratio`, a paired difference `alignment.paired_means`.
The teacher's value is the ceiling to approach. Values of another M are not comparable, above all Vendi's.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from stepdistill.eval import weights
from stepdistill.eval.metrics import unit
from stepdistill.eval.pictures import shrunk
from stepdistill.models.precision import exact

Distance = Callable[[Tensor, Tensor], Tensor]           # pictures (B, 3, H, W) and as many others, to B values
JUDGE = "alexnet"                                       # what LPIPS looks through, where extractors are named
LEAST = 31                                              # pixels of a side, below which AlexNet has nothing left to pool


def _directions(features: Tensor) -> Tensor:
    """Features (P, M, d) at length one."""
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"diversity needs features of at least 2 pictures of each prompt, (P, M, d), got {tuple(features.shape)}")
    return unit(features)


def mean_distance(features: Tensor) -> Tensor:
    """Mean of 1 - cos over the pairs of each prompt, (P,), of features (P, M, d), M >= 2. Between 0 and M / (M - 1).

    The sum over pairs is read off the length of the sum of the unit vectors. Raises ValueError for features of another shape or without
    a direction.
    """
    directions = _directions(features)
    m, total = features.shape[1], directions.sum(1).square().sum(1)             # M + 2 sum over pairs of cos
    return 1 - (total - m) / (m * (m - 1))


def vendi(features: Tensor) -> Tensor:
    """Vendi score of each prompt, (P,), of features (P, M, d), M >= 2: the effective number of different pictures.

    Divided by nothing: 1 where all M are equal, M where they are orthogonal. The eigenvalues are the squared singular values of the
    normalised features over M, so the cost is M^2 d. Raises ValueError as `mean_distance` does.
    """
    values = torch.linalg.svdvals(_directions(features)).square() / features.shape[1]
    return torch.special.entr(values).sum(1).exp()


def lpips_distance(pictures: Tensor, distance: Distance, range: tuple[float, float] = (-1.0, 1.0), batch: int = 32) -> Tensor:
    """Mean of `distance` over the pairs of each prompt, (P,), of uint8 pictures (P, M, 3, H, W), M >= 2.

    `range` is what 0 and 255 become. LPIPS wants (-1, 1); DMD2's figures feed (0, 1) and are lower: the range belongs in the name of the
    number. Pictures are taken at the size they have (512 pixels is usual). Raises ValueError for pictures of another form.
    """
    if pictures.dtype != torch.uint8 or pictures.ndim != 5 or pictures.shape[1] < 2 or pictures.shape[2] != 3:
        raise ValueError(f"lpips_distance reads uint8 pictures (P, M, 3, H, W) with M of 2 or more, got {pictures.dtype} "
                         f"{tuple(pictures.shape)}")
    low, high = range
    first, second = torch.triu_indices(pictures.shape[1], pictures.shape[1], offset=1)
    values = []
    with exact(), torch.inference_mode():
        for seeds in pictures:
            x = seeds.float() / 255 * (high - low) + low
            pairs = zip(first.split(batch), second.split(batch), strict=True)
            values.append(torch.cat([distance(x[i], x[j]).flatten() for i, j in pairs]).double().mean())
    return torch.stack(values).cpu()


def paired_lpips(a: Tensor, b: Tensor, distance: Distance, side: int = 512, batch: int = 32) -> Tensor:
    """`distance` of each of the uint8 pictures (N, C, H, W), grey or of three channels, to the other at its row, float64 (N,).

    It is fed [-1, 1], and larger pictures shrunk until their short side has `side` pixels. Raises ValueError for sets of other shapes.
    """
    if a.dtype != torch.uint8 or b.dtype != torch.uint8 or a.shape != b.shape or a.ndim != 4 or a.shape[1] not in (1, 3):
        raise ValueError(f"paired_lpips reads two sets of uint8 pictures (N, 1 or 3, H, W), got {a.dtype} {tuple(a.shape)} and {b.dtype} "
                         f"{tuple(b.shape)}")

    def fed(pictures: Tensor) -> Tensor:
        return torch.stack([shrunk(picture, side, "lanczos") for picture in pictures]).expand(-1, 3, -1, -1).float() / 127.5 - 1

    with exact(), torch.inference_mode():
        found = [distance(fed(x), fed(y)).flatten().double() for x, y in zip(a.split(batch), b.split(batch), strict=True)]
    return torch.cat(found).cpu()


def spare_lpips(device: torch.device | str = "cpu") -> Distance | None:
    """LPIPS where its weights and its package are there, else None. Raises ValueError for damaged weights."""
    try:
        weights.find(JUDGE)
    except FileNotFoundError:
        return None
    return None if find_spec("lpips") is None else load_lpips(device)


def load_lpips(device: torch.device | str = "cpu") -> Distance:
    """LPIPS on AlexNet, by the optional package `lpips`; it fetches pictures to where it is.

    Raises ValueError where the package is absent, and as `weights.network`.
    """
    try:
        import lpips
    except ModuleNotFoundError as error:
        raise ValueError(f"LPIPS needs the package lpips ({error}): pip install stepdistill[eval]") from error
    layers = weights.network(JUDGE)[0].state_dict()
    judge = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    judge.net.load_state_dict({name: layers[name.partition(".")[2]] for name in judge.net.state_dict()})       # slice2.3.weight
    judge.register_forward_pre_hook(lambda _, pictures: tuple(each.to(device) for each in pictures))
    return judge.requires_grad_(False).to(device)
