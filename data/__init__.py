"""The data commands: each is run from the repository as `python -m data.NAME`; --help says what it does."""
import sys
from importlib.util import find_spec

# Here, for it is imported before any of them; found, not imported: torch would cost each worker of data.text 2 s.
if missing := [name for name in ("numpy", "torch") if find_spec(name) is None]:
    print(f"error: no package {' or '.join(missing)} in {sys.executable}; source .venv/bin/activate (./run.sh sets it "
          "up), then again", file=sys.stderr)
    sys.exit(2)
