"""What the tests share: helpers, programs that tests start, and the root of the repository."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
