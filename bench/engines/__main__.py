import sys

from .plugin import main

if __name__ == "__main__":
    sys.exit(main())
