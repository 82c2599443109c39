"""The command line: `stepdistill.commands`, put together.

Exit codes: 0 done, 2 the user's input (one line that names the remedy), 1 a fault of ours, 130 interrupted. With --json one JSON object
goes to standard output and everything else to standard error.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

import typer

from stepdistill.commands import inspecting, making, scoring

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False,
                  help="Turn any diffusers pipeline into a one-to-four-step one.",
                  epilog="First try: `bash scripts/quickstart.sh`, or `stepdistill train --config fashion/dmd2 --out runs/first`.")
COMMANDS: dict[str, Callable[..., None]] = {
    "train": making.train, "cache": making.cache, "pairs": making.pairs, "plan": making.plan, "export": making.export,
    "sample": making.sample, "demo": making.demo, "eval": scoring.evaluate, "protocols": scoring.protocols,
    "reference": scoring.reference, "compare": scoring.compare, "league": scoring.league, "diagnose": scoring.diagnose,
    "methods": inspecting.methods, "probe": inspecting.probe, "doctor": inspecting.doctor,
}
for name, command in COMMANDS.items():
    app.command(name)(command)

bench = typer.Typer(no_args_is_help=True, help="Timings: of training steps, and of models.")
bench.command("step")(inspecting.bench_step)
bench.command("speed")(inspecting.bench_speed)
app.add_typer(bench, name="bench")
weights = typer.Typer()
weights.callback(invoke_without_command=True)(scoring.list_weights)
weights.command("convert")(scoring.convert_weights)
app.add_typer(weights, name="weights")
judges = typer.Typer(no_args_is_help=True, help="Judges that live in environments of their own: pictures for them, and what they said.")
judges.command("write")(scoring.write_for_judges)
judges.command("read")(scoring.read_from_judges)
app.add_typer(judges, name="judges")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run a command; the exit code."""
    show_trace = os.environ.get("STEPDISTILL_TRACEBACK") == "1"
    try:
        code = app(arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if show_trace:
            traceback.print_exc()
        print(f"stepdistill: {_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if type(error).__name__ in ("Abort",):
            return 130
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):    # the parser's own errors
            message = error.format_message()
            if message:
                print(f"stepdistill: {' '.join(message.split())} (see --help)", file=sys.stderr)
            return int(error.exit_code) if message else 2
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            print("stepdistill: too little memory: lower batch_size, or raise accumulate to keep it", file=sys.stderr)
            return 2
        if isinstance(error, FloatingPointError):
            print(f"stepdistill: {error}", file=sys.stderr)
            return 1
        traceback.print_exc()
        return 1


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror or error}: {error.filename}; check the path and who may write there"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    main()
