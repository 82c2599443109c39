"""Distil by consistency: accelerate launch scripts/train_consistency.py [--config fashion/consistency] [key=value ...] --out RUN"""

import sys

from stepdistill.cli import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    named = any(a.split("=")[0] in ("--config", "--resume", "--help") for a in arguments)
    main(["train", *([] if named else ["--config", "fashion/consistency"]), *arguments])
