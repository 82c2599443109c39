"""Loss weights as functions of log-SNR, float64 in, float64 out. They multiply the squared error of x0 unless their name says otherwise."""

from __future__ import annotations

from torch import Tensor


def snr(log_snr: Tensor) -> Tensor:
    """alpha²/sigma²: turns x0 error into eps error (distribution_matching S.2)."""
    return log_snr.exp()


def truncated_snr(log_snr: Tensor, floor: float = 1.0) -> Tensor:
    """max(SNR, floor) (Salimans & Ho 2022, eq. 6)."""
    return log_snr.exp().clamp_min(floor)


def min_snr(log_snr: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) (Hang et al. 2023)."""
    return log_snr.exp().clamp_max(gamma)


def v_weight(log_snr: Tensor) -> Tensor:
    """1 + SNR: x0 error to v error on a VP process."""
    return 1 + log_snr.exp()


def edm(log_snr: Tensor, sigma_data: float = 0.5) -> Tensor:
    """SNR + 1/sigma_data² (Karras et al. 2022, table 1)."""
    return log_snr.exp() + sigma_data**-2
