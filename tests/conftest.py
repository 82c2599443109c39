"""Put tests/ on the path, so that every test file can `from oracles import ...` under --import-mode=importlib."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
