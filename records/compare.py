"""The command `python records/compare.py`; all that it does is in the package compare/ beside this file."""
import sys

from compare.command_line import main

if __name__ == "__main__":
    sys.exit(main())
