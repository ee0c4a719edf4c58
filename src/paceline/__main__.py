"""`python -m paceline` is the command line; torchrun starts workers this way too."""

from paceline.cli import main

if __name__ == "__main__":
    main()
