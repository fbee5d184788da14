"""`python -m engine.bench`."""

from engine.bench.cli import main

if __name__ == "__main__":
    main()
