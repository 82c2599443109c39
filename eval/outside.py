"""Judges that live elsewhere: pictures go out in the layout each of them reads, and its result file comes back as estimates.

Their packages pin versions that exclude each other, so none is a dependency: run each in an environment of its own.

    write_plain     prompts.jsonl, 00000_0000.png ...         any judge of one picture and one prompt     read_plain
    write_geneval   00000/metadata.jsonl, 00000/samples/*     GenEval, evaluate_images.py                 read_geneval
    write_dpg       NAME.png, four pictures in a square       DPG-Bench, compute_dpg_bench.py             read_dpg
    write_hpsv2     STYLE/00000.jpg                           hpsv2.evaluate                              read_hpsv2
    write_vbench    PROMPT-0/00000.png (frames, no video)     VBench, vbench evaluate                     read_vbench

Layouts and result files are as the named sources read and write them. No judge has been run on a folder of ours. The judges' prompt
lists are not here: fetch them with the judge, and generate in their order. `eval.benchmarks` does both for a model and for a result.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from stepdistill.eval.alignment import Paired, paired_means, stratified_mean
from stepdistill.eval.metrics import Estimate, bootstrap_mean, student_t
from stepdistill.export import in_one_move
from stepdistill.images import to_image

PROMPTS = "prompts.jsonl"
STYLES = ("anime", "concept-art", "paintings", "photo")                         # of HPSv2, 800 prompts each
LONGEST = 200                                                                   # bytes of a name, well within what file systems take
NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"

Named = TypeVar("Named")


# ---------------------------------------------------------------------------------------------------------------------------- going out


def write_plain(to: Path, prompts: Sequence[str], pictures: Iterable[Tensor]) -> None:
    """prompts.jsonl with {"prompt", "files"} on line i, and each prompt's uint8 pictures (M, C, H, W) as PNG files of those names.

    Here and below the new or empty folder `to` appears whole or not at all, `pictures` may be made one prompt at a time, and ValueError is
    raised for a folder with anything in it, for pictures of another form and for a number of them that is not the number of prompts.
    """
    with in_one_move(_new(to)) as folder, (folder / PROMPTS).open("w") as lines:
        for i, (prompt, seeds) in enumerate(_together(prompts, pictures, 4)):
            files = [f"{i:05d}_{j:04d}.png" for j in range(len(seeds))]
            for name, picture in zip(files, seeds, strict=True):
                _save(picture, folder / name)
            lines.write(json.dumps({"prompt": prompt, "files": files}) + "\n")


def write_geneval(to: Path, metadata: Sequence[Mapping[str, Any]], pictures: Iterable[Tensor]) -> None:
    """Of the lines of GenEval's evaluation_metadata.jsonl, all of them and in order, and uint8 pictures (M, C, H, W) of each; M is 4."""
    for i, line in enumerate(metadata):
        if not {"tag", "prompt"} <= set(line):
            raise ValueError(f"line {i + 1} of the metadata lacks a tag or a prompt: give the lines of GenEval's evaluation_metadata.jsonl")
    with in_one_move(_new(to)) as folder:
        for i, (line, seeds) in enumerate(_together(metadata, pictures, 4)):
            samples = folder / f"{i:05d}" / "samples"
            samples.mkdir(parents=True)
            (samples.parent / "metadata.jsonl").write_text(json.dumps(dict(line)))
            for j, picture in enumerate(seeds):
                _save(picture, samples / f"{j:04d}.png")


def write_dpg(to: Path, names: Sequence[str], pictures: Iterable[Tensor]) -> None:
    """Four square uint8 pictures (4, C, H, H) a prompt, two by two in one file; `names` are those of the prompt files, without .txt.

    The judge wants to be told --pic-num 4 --resolution H. It reads a file's name up to the first dot.
    """
    _file_names(names)
    if dotted := [name for name in names if "." in name]:
        raise ValueError(f"{dotted[0]!r} has a dot, where the judge stops reading: give the names of the prompt files without .txt")
    with in_one_move(_new(to)) as folder:
        for name, seeds in _together(names, pictures, 4):
            if len(seeds) != 4 or seeds.shape[2] != seeds.shape[3]:
                raise ValueError(f"DPG-Bench takes four square pictures of each prompt, got {tuple(seeds.shape)} of {name!r}")
            rows = [torch.cat(list(pair), dim=2) for pair in seeds.split(2)]
            _save(torch.cat(rows, dim=1), folder / f"{name}.png")


def write_hpsv2(to: Path, pictures: Mapping[str, Iterable[Tensor]]) -> None:
    """One uint8 picture (C, H, W) for each of a style's 800 prompts, in their order; the judge finds the prompts by number.

    The judge asks for names in .jpg. The files hold PNG all the same, which Pillow sees in their first bytes: nothing is lost to
    compression. The pictures that came with the judge are real JPEG, which may score a little differently.
    """
    if odd := sorted(set(pictures) - set(STYLES)):
        raise ValueError(f"HPSv2 has no style {odd[0]!r}: its styles are {', '.join(STYLES)}")
    with in_one_move(_new(to)) as folder:
        for style, each in pictures.items():
            (folder / style).mkdir()
            for i, picture in enumerate(each):
                _save(picture, folder / style / f"{i:05d}.jpg")


def write_vbench(to: Path, prompts: Sequence[str], videos: Iterable[Tensor]) -> None:
    """Frames of uint8 videos (V, T, C, H, W) of each prompt, in folders PROMPT-0 to PROMPT-(V - 1); V is 5, for temporal flickering 25.

    No video is encoded. The judge wants PROMPT-0.mp4 and so on, alone in one folder: encode each folder's frames at the frame rate of the
    model, without loss. Only its dynamic degree reads frames as they are.
    """
    _file_names(prompts)
    with in_one_move(_new(to)) as folder:
        for prompt, seeds in _together(prompts, videos, 5):
            for v, frames in enumerate(seeds):
                video = folder / f"{prompt}-{v}"
                video.mkdir()
                for t, frame in enumerate(frames):
                    _save(frame, video / f"{t:05d}.png")


def _new(to: Path) -> Path:
    to = to.expanduser().resolve()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to} is not empty: choose another folder")
    return to


def _together(prompts: Sequence[Named], pictures: Iterable[Tensor], dims: int) -> Iterator[tuple[Named, Tensor]]:
    rest = iter(pictures)
    for i, prompt in enumerate(prompts):
        seeds = next(rest, None)
        if seeds is None:
            raise ValueError(f"{len(prompts)} prompts but pictures of {i}: give as many")
        if seeds.ndim != dims or not len(seeds):
            raise ValueError(f"pictures of a prompt have {dims} dimensions, seeds in the first, got {tuple(seeds.shape)} of prompt {i}")
        yield prompt, seeds
    if next(rest, None) is not None:
        raise ValueError(f"pictures of more than the {len(prompts)} prompts: give as many")


def _save(picture: Tensor, path: Path) -> None:
    """A PNG, whatever the name says."""
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise ValueError(f"a picture is uint8 (C, H, W) of 1 or 3 channels, got {picture.dtype} {tuple(picture.shape)}: quantise it first")
    to_image(picture).save(path, format="PNG")


def _file_names(names: Sequence[str]) -> None:
    for name in names:
        if not name or name.startswith(".") or re.search(r"[/\\\x00]", name) or len(name.encode()) > LONGEST:
            raise ValueError(f"{name[:40]!r} cannot name a file (empty, hidden, over {LONGEST} bytes or with a slash): leave it out")
    if len(set(names)) != len(names):
        raise ValueError(f"{max(names, key=names.count)!r} is named twice: give each prompt once, with all its seeds")


# --------------------------------------------------------------------------------------------------------------------------- coming back


@dataclass(frozen=True)
class Judged:
    """What a judge said of each prompt, its pictures averaged first. With `skills` the score is the mean over skills of their means."""

    prompts: tuple[str, ...]                            # what tells prompts apart: the text, or what the judge keeps of it
    scores: Tensor                                      # float64 (P,)
    skills: tuple[str, ...] | None = None

    @property
    def estimate(self) -> Estimate:
        """The judge's score, with the bootstrap over prompts (within each skill)."""
        return bootstrap_mean(self.scores) if self.skills is None else stratified_mean(self.scores, self.skills)

    def to_dict(self) -> dict[str, Any]:
        """A block of a result file: the estimate, and the scores from which another result is paired with this one."""
        return {**self.estimate.to_dict(), "prompts": list(self.prompts), "scores": self.scores.tolist(),
                "skills": None if self.skills is None else list(self.skills)}

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> Judged | None:
        """The inverse; None for an estimate alone."""
        if "scores" not in block:
            return None
        skills = block["skills"]
        return cls(tuple(block["prompts"]), torch.tensor(block["scores"], dtype=torch.float64), None if skills is None else tuple(skills))

    @property
    def by_skill(self) -> dict[str, Estimate]:
        """Of each skill alone."""
        skills = self.skills or ()
        return {skill: bootstrap_mean(self.scores[[s == skill for s in skills]]) for skill in dict.fromkeys(skills)}


def paired(a: Judged, b: Judged) -> Paired:
    """Difference a - b of two models and the win rate of a, prompt by prompt. Raises ValueError where one was judged on other prompts."""
    if alone := set(a.prompts) ^ set(b.prompts):
        raise ValueError(f"{len(alone)} prompts are judged for one model alone, such as {min(alone)[:60]!r}: judge both on the same")
    row = {prompt: i for i, prompt in enumerate(b.prompts)}
    return paired_means(a.scores, b.scores[[row[prompt] for prompt in a.prompts]], a.skills)


def read_plain(folder: Path, scores: Path) -> Judged:
    """Scores of a folder of `write_plain`: JSON lines {"file", "score"}, every file once.

    As every reader below, raises FileNotFoundError for a missing file and ValueError, in one line, for one that is damaged, cut short or
    of another judge.
    """
    given: dict[str, float] = {}
    for where, line in _json_lines(scores):
        name = _field(line, "file", str, where)
        if name in given:
            raise ValueError(f"{where}: {name} is scored twice: judge the folder again")
        given[name] = _number(line, "score", where)
    found: dict[str, list[float]] = {}
    wanted: set[str] = set()
    for i, (where, line) in enumerate(_json_lines(folder / PROMPTS)):
        files = [str(name) for name in _field(line, "files", list, where)]
        if missing := [name for name in files if name not in given]:
            raise ValueError(f"{scores} has no score of {missing[0]}: judge the folder again")
        found[f"{i:05d} {_field(line, 'prompt', str, where)}"] = [given[name] for name in files]
        wanted.update(files)
    if unknown := set(given) - wanted:
        raise ValueError(f"{scores} scores {min(unknown)}, which is not in {folder}: name the folder that was judged")
    return _judged(found, scores, equal=False)


def read_geneval(path: Path) -> Judged:
    """GenEval's results.jsonl: shares of right pictures, by skill. `estimate` is its overall score, from 0 to 1."""
    found: dict[str, list[float]] = {}
    skills: dict[str, str] = {}
    for where, line in _json_lines(path):
        prompt = _field(line, "metadata", str, where)
        found.setdefault(prompt, []).append(float(_field(line, "correct", bool, where)))
        skills[prompt] = _field(line, "tag", str, where)
    return _judged(found, path, skills)


def read_dpg(path: Path) -> Judged:
    """DPG-Bench's results .txt: per prompt the mean over its pictures, times 100 as the judge prints it."""
    found: dict[str, list[float]] = {}
    for where, line in _lines(path):
        if line.startswith("Model: "):                                          # the judge's summary, after the last picture
            break
        match = re.fullmatch(rf"(?P<file>.+\.[a-zA-Z]\w*)(?P<scores>(?:, {NUMBER}){{2,}})", line)
        if match is None:
            raise ValueError(f"{where} is no line of DPG-Bench's results (a file, its scores and their mean): judge the folder again")
        name, (*scores, mean) = Path(match["file"]).stem, map(float, match["scores"].split(", ")[1:])
        if name in found or abs(mean - sum(scores) / len(scores)) > 1e-6:
            raise ValueError(f"{where}: {name} is there twice, or its scores do not have the mean beside them: judge the folder again")
        found[name] = [100 * score for score in scores]
    return _judged(found, path)


def read_hpsv2(path: Path) -> dict[str, Estimate]:
    """What hpsv2.evaluate prints, kept in a file: an estimate by style, and "average" where all four are there; 100 times the cosine.

    The judge keeps no value of a prompt, so nothing can be paired: for that, score the plain layout with hpsv2.score. It prints the mean of
    ten groups of 80 prompts and the deviation between them, of which the error of the mean is a third.
    """
    row = re.compile(rf"(?:.* )?(?P<style>{'|'.join(STYLES)})\s+(?P<mean>{NUMBER})\s+(?P<std>{NUMBER})\s*")
    out: dict[str, Estimate] = {}
    for where, line in _lines(path):
        if (match := row.fullmatch(line)) is None:                              # whatever else the judge says on its way
            continue
        style, mean = match["style"], float(match["mean"])
        if style in out or not 1 < mean < 100:
            raise ValueError(f"{where}: {style!r} is there twice, or {mean:g} is not on hpsv2's scale of 100: keep the table of one model")
        out[style] = _of_groups(mean, float(match["std"]) / math.sqrt(10 - 1), 800, 10)
    if not out:
        raise ValueError(f"{path} holds no table of hpsv2 (MODEL STYLE MEAN DEVIATION): keep what hpsv2.evaluate prints")
    if len(out) == len(STYLES):
        each = list(out.values())
        se = math.sqrt(sum(e.se**2 for e in each)) / len(each)
        out["average"] = _of_groups(sum(e.value for e in each) / len(each), se, 3200, 40)
    return out


def _of_groups(mean: float, se: float, n: int, groups: int) -> Estimate:
    half = student_t(groups - 1) * se
    return Estimate(mean, mean, se, (mean - half, mean + half), n, groups)


def read_vbench(path: Path) -> dict[str, Judged]:
    """VBench's NAME_eval_results.json, by dimension: per prompt the mean over its videos, from 0 to 1.

    The judge's own mean of a dimension may weigh videos by their frames or leave out those in which it found no object; ours gives every
    prompt that it lists the same weight. Imaging quality is listed by the judge in per cent. Its normalised totals are not made here.
    """
    text = _text(path)
    try:
        dimensions = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): judge the folder again") from error
    if not isinstance(dimensions, dict) or not dimensions:
        raise ValueError(f"{path} is no result of VBench: give NAME_eval_results.json")
    out = {}
    for dimension, block in dimensions.items():
        where = f"{path}, {dimension!r}"
        if not isinstance(block, list) or len(block) != 2 or not isinstance(block[1], list):
            raise ValueError(f"{where}: no mean and list of videos, so this is no result of VBench")
        found: dict[str, list[float]] = {}
        for video in block[1]:
            if not isinstance(video, dict):
                raise ValueError(f"{where}: a video is no object: judge the folder again")
            name = re.fullmatch(r"(.+)-\d+", Path(_field(video, "video_path", str, where)).stem)
            if name is None:
                raise ValueError(f"{where}: {video['video_path']} is not named PROMPT-NUMBER: name the videos as write_vbench does")
            score = _number(video, "video_results", where)
            found.setdefault(name[1], []).append(score / 100 if dimension == "imaging_quality" else score)
        out[dimension] = _judged(found, path, equal=False)
    return out


def _judged(found: Mapping[str, Sequence[float]], path: Path, skills: Mapping[str, str] | None = None, equal: bool = True) -> Judged:
    """`equal` refuses prompts of fewer pictures than others: a judge that was stopped."""
    if not found:
        raise ValueError(f"{path} holds no scores: run the judge again")
    most = max(map(len, found.values()))
    if equal and (short := [prompt for prompt, scores in found.items() if len(scores) != most]):
        raise ValueError(f"{path} has {len(found[short[0]])} pictures of {short[0][:60]!r} and {most} of others: judge the whole folder")
    means = torch.tensor([sum(scores) / len(scores) for scores in found.values()], dtype=torch.float64)
    return Judged(tuple(found), means, tuple(skills[prompt] for prompt in found) if skills else None)


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: run the judge, and name what it writes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: name the judge's result file") from error


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Where each line that is not empty stands, and the line."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", line


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in _lines(path):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON ({error}): judge the folder again") from error
        if not isinstance(value, dict):
            raise ValueError(f"{where} is no JSON object: judge the folder again")
        yield where, value


def _field(line: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    if not isinstance(line.get(name), kind):
        raise ValueError(f"{where} has no {name!r} of the right kind ({kind.__name__}): is this another judge's file?")
    return line[name]


def _number(line: Mapping[str, Any], name: str, where: str) -> float:
    value = line.get(name)
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise ValueError(f"{where} has no number {name!r}: judge the folder again")
    return float(value)
