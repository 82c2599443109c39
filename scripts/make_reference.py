"""Reduce Fashion-MNIST to what the evaluation needs of it, as seen by the shipped classifier.

    python scripts/make_reference.py                                      # reference.safetensors, about a minute on one core

Float64 moments of all training and all test pictures; fp16 features and labels of the 10,000 test pictures and of every sixth training one.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save

from stepdistill.eval.extractors import Fashion, extract
from stepdistill.eval.metrics import Moments
from stepdistill.eval.protocol import BATCH, REFERENCE
from stepdistill.worlds.fashion import data

EVERY = {"train": 6, "test": 1}                         # of which pictures features are kept


def main(
    out: Annotated[Path, typer.Option(help="folder for reference.safetensors")] = Path("stepdistill/worlds/fashion"),
    folder: Annotated[Path | None, typer.Option(help="folder with the four IDX files")] = None,
) -> None:
    """Write the reference statistics of the fashion world."""
    extractor, tensors = Fashion(), {}
    metadata = {"extractor": extractor.name, "extractor_sha256": extractor.sha256, "batch_size": str(BATCH),
                "licence": "Fashion-MNIST, MIT, Copyright (c) 2017 Zalando SE"}
    for split, every in EVERY.items():
        pictures = data.load(split, folder)
        features, logits = extract(extractor, pictures.images, BATCH)
        assert logits is not None
        moments = Moments.of(features)
        tensors |= {f"{split}.n": torch.tensor(moments.n), f"{split}.mean": moments.mean, f"{split}.cov": moments.cov,
                    f"{split}.features": features[::every].half(), f"{split}.labels": pictures.labels[::every].to(torch.uint8)}
        raw = pictures.images.numpy().tobytes() + pictures.labels.to(torch.uint8).numpy().tobytes()
        metadata[f"{split}_sha256"] = hashlib.sha256(raw).hexdigest()      # of the pixels and labels, however they were packed
        hits = (logits.argmax(1) == pictures.labels).double().mean()
        print(f"{split}: {len(pictures)} pictures, accuracy {hits:.4f}")
    temporary = out / f"{REFERENCE}.partial"
    temporary.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, metadata=metadata))
    os.replace(temporary, out / REFERENCE)
    print(f"{(out / REFERENCE).stat().st_size / 1e6:.2f} MB in {out / REFERENCE}")


if __name__ == "__main__":
    typer.run(main)
