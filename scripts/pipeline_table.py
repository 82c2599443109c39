"""Record every tiny pipeline of the zoo, prove parity, and write docs/pipelines.md and docs/pipelines.json.

    python scripts/pipeline_table.py
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from zoo import basics, images, videos  # noqa: E402

from stepdistill import probe as probing  # noqa: E402

HEAD = """# Which pipelines can be distilled as they are

Made by `python scripts/pipeline_table.py` with diffusers {version} on tiny networks of the real classes with random weights, in float32 on
a CPU (`tests/zoo/`). Nothing in this table has a line of code of its own: what each pipeline does was recorded from runs of it. "Parity" is
the largest difference between our guided prediction and what the pipeline itself hands its scheduler, over its size, at times, guidance,
batch sizes and (where there is a second size) shapes that were not used for fitting, for a batch of mixed times, and after a whole sampling
with a first-order scheduler; the bound is 1e-4. `stepdistill probe FOLDER` does the same for a pipeline of yours.

{passed} of {tried} pipelines tried pass; {refused} are refused or fail, with the reason; {left} could not be built here.

"""


def examine(name: str, exhibit: Any) -> dict[str, Any]:
    """One row; whatever a pipeline throws is a finding."""
    pipeline = exhibit.build()
    try:
        return {"name": name, **probing.probe(pipeline, exhibit.inputs, exhibit.other_shape or None)}
    except Exception as error:
        return {"name": name, "pipeline": type(pipeline).__name__, "fits": False, "reason": " ".join(str(error).split())[:200]}


def main() -> None:
    warnings.filterwarnings("ignore")
    zoo = {**basics.EXHIBITS, **images.EXHIBITS, **{f"{k}-video" if k in images.EXHIBITS else k: v for k, v in videos.EXHIBITS.items()}}
    rows = [examine(name, exhibit) for name, exhibit in tqdm(zoo.items(), unit="pipeline")]
    left = {**images.LEFT_OUT, **videos.LEFT_OUT}
    passed = [row for row in rows if row["fits"]]
    failed = [row for row in rows if not row["fits"]]
    lines = ["| | pipeline | network | predicts | clock | guidance | parity |", "|---|---|---|---|---|---|--:|"]
    lines += [f"| {r['name']} | `{r['pipeline']}` | `{r['network']}` | {r['prediction']} | {', '.join(r['clock'].values())} "
              f"| {_guidance(r)} | {max(v for v in r['parity'].values() if v is not None):.0e} |" for r in passed]
    lines += ["", "## Not as they are", "", "| | pipeline | why |", "|---|---|---|"]
    lines += [f"| {r['name']} | `{r['pipeline']}` | {r['reason']} |" for r in failed]
    lines += ["", "## Not built here", "", *(f"- {name}: {reason}" for name, reason in left.items()), ""]
    head = HEAD.format(version=diffusers.__version__, passed=len(passed), tried=len(rows), refused=len(failed), left=len(left))
    (ROOT / "docs" / "pipelines.md").write_text(head + "\n".join(lines))
    table = {"diffusers": diffusers.__version__, "pipelines": rows, "left_out": left}
    (ROOT / "docs" / "pipelines.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"{len(passed)} of {len(rows)} pass")


def _guidance(row: dict[str, Any]) -> str:
    guidance = row["guidance"]
    return guidance["law"] + (f", w = {guidance['w']}" if guidance["w"] not in (None, "g") else "")


if __name__ == "__main__":
    main()
