"""What docs/evaluation.md shows of the library runs as it stands there."""

import re
from pathlib import Path

import torch

DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_the_library_as_the_docs_show_it() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    real, theirs = (torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (300, 250))
    known = {"real": real, "theirs": theirs, "ours": 1.5 * theirs}
    exec(code, known)
    assert known["found"].ci95[0] < known["found"].value < known["found"].ci95[1]
    assert known["ahead"].ci95[0] > 0                                           # ours are too wide, theirs are not
    assert known["nearer"].ci95[0] > 0
    assert known["cmmd"].value > 0
    assert known["precision"] < 0.9 < known["recall"]
    assert known["density"] < 1
