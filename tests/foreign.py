"""The beginning of a script for a process in which stepdistill cannot be imported, nor any part of it."""

WITHOUT_US = """
import sys
sys.modules["stepdistill"] = None
try:
    import stepdistill.models
except ImportError:
    pass
else:
    raise SystemExit("stepdistill could be imported: the test proves nothing")
"""
