"""`python -m loss_core.cli`: the command `loss-core`, if its script is not on the path."""

from loss_core.cli import main

if __name__ == "__main__":
    main()
