import sys

from .parts import main

if __name__ == "__main__":
    sys.exit(main())
