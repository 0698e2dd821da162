"""`python -m veneer`, the same as `veneer`."""

from veneer.cli import main

if __name__ == "__main__":
    main()
