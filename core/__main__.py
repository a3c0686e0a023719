"""`python -m prunus.core`: the command, for launchers that start modules (torchrun -m, accelerate launch -m)."""

from prunus.core.cli import main

if __name__ == "__main__":
    main()
