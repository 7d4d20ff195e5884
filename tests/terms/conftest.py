"""Makes `objectives` importable from the tests of terms."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
